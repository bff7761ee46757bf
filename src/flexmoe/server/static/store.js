/** Conversations, kept in this browser (IndexedDB). A conversation: {id, title, changed, settings, messages}. */

const NAME = "flexmoe";
const TABLE = "conversations";
const FORMAT = "flexmoe-conversations-1";

let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(TABLE, { keyPath: "id" });
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  return opened;
}

async function run(mode, work) {
  const transaction = (await database()).transaction(TABLE, mode);
  const wish = work(transaction.objectStore(TABLE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(wish.result);
    transaction.onerror = () => reject(transaction.error);
  });
}

/** An empty one. settings: of the one before, which people mostly want to go on with. */
export const fresh = (settings = {}) => ({
  id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, // randomUUID needs https or localhost
  title: "New conversation",
  changed: Date.now(),
  settings: { ...settings },
  messages: [],
});

/** All of them, the latest first. */
export async function all() {
  const found = await run("readonly", (table) => table.getAll());
  return found.sort((a, b) => b.changed - a.changed);
}

/** Keep a conversation as it is now. */
export const put = (conversation) => run("readwrite", (table) => table.put(conversation));

/** Forget a conversation. */
export const remove = (id) => run("readwrite", (table) => table.delete(id));

/** All conversations as a JSON file. */
export const exported = async () => JSON.stringify({ format: FORMAT, conversations: await all() }, null, 1);

/** Take in an exported file, and return how many conversations it held. Throws an Error that says what is wrong. */
export async function imported(text) {
  const conversations = check(parse(text));
  for (const conversation of conversations) await put(conversation);
  return conversations.length;
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON; choose one that this page exported.");
  }
}

/** Only what is understood is taken in. */
function check(data) {
  if (data?.format !== FORMAT || !Array.isArray(data.conversations)) {
    throw new Error("The file holds no conversations; choose one that this page exported.");
  }
  return data.conversations.map((one) => {
    const messages = Array.isArray(one.messages) ? one.messages : [];
    const whole = messages.filter(
      (m) => ["user", "assistant"].includes(m?.role) && typeof m.content === "string",
    );
    const settings = one.settings && typeof one.settings === "object" ? one.settings : {};
    const title = String(one.title ?? "Imported").slice(0, 80);
    return {
      ...fresh(settings),
      id: String(one.id),
      title,
      changed: Number(one.changed) || 0,
      messages: whole,
    };
  });
}
