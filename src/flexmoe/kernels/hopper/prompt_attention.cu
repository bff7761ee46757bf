// Causal attention of prompts over the paged KV cache on Hopper's tensor cores, heads of 128: a tile of queries and of
// keys at a time (Dao et al., 2022), products of one tile under the softmax of another (Shah et al., 2024).
// attention.py compiles it, and says what enters and leaves.
//
// One block of threads a processor, of three warpgroups. The first one loads: 128 queries of one head, then keys and
// values of their request, 128 at a time, into rings in shared memory: those of this step by the copy engine, from where
// they lie row after row, those of earlier steps by threads, out of the cache's blocks. Each of the two others has 64 of
// the queries: while the tensor cores multiply one tile's weights by its values, and the next tile's keys by the
// queries, it works out weights. Tiles of keys begin at multiples of 128 from position 0, so a row's sums have the same
// order however its prompt is cut.

constexpr int ROWS = 128, KEYS = 128, D = 128, STAGES = 3, GROUPS = 2, WARPGROUP = 128;
constexpr int HALF_BYTES = 128 * 128;      // of the first or last 64 columns of 128 rows, swizzled
constexpr int TILE_BYTES = 2 * HALF_BYTES;
constexpr int COPIES = 16;                 // of 16 bytes that each loading thread makes for a tile of 128 rows
constexpr float NOTHING = -1.0e30f;        // the maximum of no scores: finite, so that the difference of two is not NaN

struct Arguments {
    const element *cache;  // [slots, 2, Hkv, D]
    const int *spans;      // [N, 4]: first row, rows, position of the first, where its table begins: of each prompt
    const int *blocks;     // [B, 2]: a span, and the first of up to 128 rows in it
    const int *tables;     // blocks of the cache
    element *out;          // [T, Hq D]
    int num_heads, num_kv_heads, num_blocks, block_bits, window;  // block_bits: of a cache block's size; window: 0: none
    float scale;           // of scores, for powers of two
};

// 128 queries of a head. head: -1 after the last item. row: of the first in query and out; count: of valid ones;
// position: of the first; keys from first * KEYS to last are seen, of which this step has those from fresh to end, the
// one at position p in row shift + p.
struct Item { int head, row, count, position, first, last, table, fresh, end, shift; };

struct Shared {
    u64 query_full, query_empty, key_full[STAGES], key_empty[STAGES], value_full[STAGES], value_empty[STAGES];
    Item item;
};

// The n-th item of this block of threads: items are ordered by length, and dealt out to and fro.
__device__ __forceinline__ Item item_at(const Arguments &args, int n) {
    Item item;
    int deal = n % 2 ? (int)gridDim.x - 1 - (int)blockIdx.x : (int)blockIdx.x, index = n * (int)gridDim.x + deal;
    item.head = -1;
    if (index >= args.num_blocks * args.num_heads) return item;
    int block = index / args.num_heads;
    const int *span = args.spans + 4 * args.blocks[2 * block];
    int first = args.blocks[2 * block + 1];
    item.head = index % args.num_heads;
    item.row = span[0] + first;
    item.count = min(span[1] - first, ROWS);
    item.position = span[2] + first;
    item.last = item.position + max(item.count, 0);
    item.first = args.window ? max(0, item.position + 1 - args.window) / KEYS : 0;
    item.table = span[3];
    item.fresh = span[2], item.end = span[2] + span[1], item.shift = span[0] - span[2];
    return item;
}

// 128 rows of 256 bytes to a tile, by threads. from: this thread's chunk in row r = thread / 16 + 8 i; null for zeros.
template <typename From>
__device__ __forceinline__ void copy_tile(u32 tile, int thread, From from) {
    int chunk = thread % 16, first = thread / 16;
    u32 to = tile + chunk / 8 * HALF_BYTES + first * 128 + ((chunk % 8) ^ first) * 16;  // rows are 8 apart
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
        const element *at = from(first + 8 * i, i);
        copy_chunk(to + i * 1024, at, at);
    }
}

// 128 rows of a head, by the copy engine: both halves of their columns, one behind the other. All 128 threads arrive.
__device__ __forceinline__ void load_rows(u32 tile, const TensorMap *map, u64 *full, int row, int head, int thread) {
    if (thread) return barrier_arrive(full);
    barrier_expect(full, TILE_BYTES);
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %3, %5}], [%2];"
        ::"r"(tile), "l"(map), "r"(address_of(full)), "r"(0), "r"(row), "r"(head) : "memory");
}

__device__ __forceinline__ void load_items(
    Shared &shared, const Arguments &args, const TensorMap *query_map, const TensorMap *fresh_map, u32 queries, u32 ring,
    int thread
) {
    int stage = 0, chunk = thread % 16 * 8, width = args.num_kv_heads * D;
    u32 parity = 1;
    for (int n = 0, used = 0;; n++) {
        Item item = item_at(args, n);
        if (item.head >= 0 && item.count <= 0) continue;  // padding
        barrier_wait(&shared.query_empty, (used + 1) % 2);
        used++;
        if (thread == 0) shared.item = item;
        if (item.head < 0) break;
        load_rows(queries, query_map, &shared.query_full, item.row, item.head, thread);
        const int *table = args.tables + item.table;
        int kv_head = item.head / (args.num_heads / args.num_kv_heads);
        const element *cache = args.cache + kv_head * D + chunk;
        for (int key = item.first * KEYS; key < item.last; key += KEYS) {
            u32 keys = ring + stage * 2 * TILE_BYTES, values = keys + TILE_BYTES;
            u64 *key_full = &shared.key_full[stage], *value_full = &shared.value_full[stage];
            if (key >= item.fresh && key + KEYS <= item.end) {
                barrier_wait(&shared.key_empty[stage], parity);
                load_rows(keys, fresh_map, key_full, item.shift + key, kv_head, thread);
                barrier_wait(&shared.value_empty[stage], parity);
                load_rows(values, fresh_map, value_full, item.shift + key, args.num_kv_heads + kv_head, thread);
            } else {
                int slots[COPIES];  // of this thread's rows; -1 past the last
#pragma unroll
                for (int i = 0; i < COPIES; i++) {
                    int own = key + thread / 16 + 8 * i, within = own & ((1 << args.block_bits) - 1);
                    slots[i] = own < item.last ? (table[own >> args.block_bits] << args.block_bits) + within : -1;
                }
                barrier_wait(&shared.key_empty[stage], parity);
                copy_tile(keys, thread, [&](int, int i) {
                    return slots[i] < 0 ? nullptr : cache + (long long)slots[i] * 2 * width;
                });
                barrier_arrive_after_copies(key_full);
                barrier_wait(&shared.value_empty[stage], parity);
                copy_tile(values, thread, [&](int, int i) {
                    return slots[i] < 0 ? nullptr : cache + (long long)slots[i] * 2 * width + width;
                });
                barrier_arrive_after_copies(value_full);
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
    barrier_arrive(&shared.query_full);
}

// 64 queries by 128 keys: score [row, key] = query . key.
__device__ __forceinline__ void multiply_keys(float (&scores)[64], u32 queries, u32 keys) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u64 left = matrix(queries + k / 4 * HALF_BYTES) + k % 4 * 2;
        u64 right = matrix(keys + k / 4 * HALF_BYTES) + k % 4 * 2;
        if (k == 0) Product<128>::first(scores, left, right);
        else Product<128>::add(scores, left, right);
    }
    products_commit();
}

// Adds weights [64 queries, 128 keys] times values [128 keys, 128 columns].
__device__ __forceinline__ void multiply_values(float (&sums)[64], const u32 (&weights)[32], u32 values) {
    // Values lie with their columns together: 64 of them in 128 bytes, the others HALF_BYTES on; eight keys in 1,024.
    u64 right = matrix(values) & ~(0x3FFFull << 16) | ((u64)(HALF_BYTES >> 4) << 16);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) Weighted<D>::add(sums, weights + 4 * k, right + k * 128);
    products_commit();
}

struct Softmax {  // of two rows, r and r + 8 of a warp's 16: running maxima, and this thread's sums
    float top[2] = {NOTHING, NOTHING}, total[2] = {0.0f, 0.0f};

    // Scores become weights; `faded` is by what the sums so far are to be multiplied.
    __device__ __forceinline__ void weigh(float (&scores)[64], float scale, float (&faded)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = top[half];
#pragma unroll
            for (int j = 0; j < 16; j++)
                most = fmaxf(most, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]) * scale);
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            faded[half] = exp2_of(top[half] - most);
            top[half] = most;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 16; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &score = scores[4 * j + 2 * half + e];
                    score = exp2_of(fmaf(score, scale, -most));
                    sum += score;
                }
            total[half] = fmaf(total[half], faded[half], sum);
        }
    }
};

// Scores of keys that a row does not see become -inf. key, position: of this thread's first column and row.
__device__ __forceinline__ void hide(float (&scores)[64], int key, int position, int window) {
#pragma unroll
    for (int i = 0; i < 64; i++) {
        int at = key + i / 4 * 8 + i % 2, own = position + i % 4 / 2 * 8;
        if (at > own || (window && at <= own - window)) scores[i] = __int_as_float(0xff800000);
    }
}

__device__ __forceinline__ void pack(u32 (&weights)[32], const float (&scores)[64]) {
#pragma unroll
    for (int i = 0; i < 32; i++) weights[i] = pair_of(scores[2 * i], scores[2 * i + 1]);
}

__device__ __forceinline__ void compute_items(
    Shared &shared, const Arguments &args, u32 queries, u32 ring, int group, int thread
) {
    int stage = 0, lane = thread % 32, own = thread / 32 * 16 + lane / 4;  // own: first of this thread's two rows
    u32 parity = 0;
    auto next = [&]() { if (++stage == STAGES) stage = 0, parity ^= 1; };
    for (int n = 0;; n++) {
        barrier_wait(&shared.query_full, n % 2);
        Item item = shared.item;
        if (item.head < 0) return;
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // what threads copied, for the tensor cores
        float scores[64], sums[64], faded[2];
        u32 weights[32], own_queries = queries + group * 64 * 128;
        Softmax softmax;
        int position = item.position + group * 64 + own, column = lane % 4 * 2;
        int seen = item.position + group * 64;  // keys up to here all rows of this warpgroup see
        auto keys_at = [&](int stage) { return ring + stage * 2 * TILE_BYTES; };
        auto wait_for = [&](u64 *full, u32 parity) {
            barrier_wait(full, parity);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        };
        int key = item.first * KEYS;
        wait_for(&shared.key_full[stage], parity);
        products_begin();
        multiply_keys(scores, own_queries, keys_at(stage));
        products_wait<0>();
        products_done(scores);
        if (lane == 0) barrier_arrive(&shared.key_empty[stage]);
        if (args.window || key + KEYS > seen + 1) hide(scores, key + column, position, args.window);
        softmax.weigh(scores, args.scale, faded);
        pack(weights, scores);
#pragma unroll
        for (int i = 0; i < 64; i++) sums[i] = 0.0f;
        for (key += KEYS; key < item.last; key += KEYS) {
            int before = stage;
            u32 parity_before = parity;
            next();
            wait_for(&shared.key_full[stage], parity);
            wait_for(&shared.value_full[before], parity_before);
            products_begin();
            multiply_keys(scores, own_queries, keys_at(stage));
            multiply_values(sums, weights, keys_at(before) + TILE_BYTES);
            products_wait<1>();
            products_done(scores);
            if (lane == 0) barrier_arrive(&shared.key_empty[stage]);
            if (args.window || key + KEYS > seen + 1) hide(scores, key + column, position, args.window);
            softmax.weigh(scores, args.scale, faded);
            products_wait<0>();
            products_done(sums);
            if (lane == 0) barrier_arrive(&shared.value_empty[before]);
#pragma unroll
            for (int i = 0; i < 64; i++) sums[i] *= faded[i % 4 / 2];
            pack(weights, scores);
        }
        if (lane == 0) barrier_arrive(&shared.query_empty);
        wait_for(&shared.value_full[stage], parity);
        products_begin();
        multiply_values(sums, weights, keys_at(stage) + TILE_BYTES);
        products_wait<0>();
        products_done(sums);
        if (lane == 0) barrier_arrive(&shared.value_empty[stage]);
        next();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = softmax.total[half];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            int row = group * 64 + own + half * 8;
            element *out = args.out + (long long)(item.row + row) * args.num_heads * D + item.head * D + column;
            float share = __fdividef(1.0f, total);
            if (row < item.count)
#pragma unroll
                for (int j = 0; j < 16; j++)
                    *reinterpret_cast<u32 *>(out + 8 * j) =
                        pair_of(sums[4 * j + 2 * half] * share, sums[4 * j + 2 * half + 1] * share);
        }
    }
}

extern "C" __global__ void __launch_bounds__((1 + GROUPS) * WARPGROUP, 1) NAME(
    const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap fresh_map,
    const __grid_constant__ Arguments args
) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 queries = address_of(memory), ring = queries + TILE_BYTES;
    Shared &shared = *reinterpret_cast<Shared *>(memory + (1 + 2 * STAGES) * TILE_BYTES);
    static_assert((1 + 2 * STAGES) * TILE_BYTES + sizeof(Shared) <= SHARED_BYTES, "more than a block may have");
    int group = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
    if (threadIdx.x == 0) {
        barrier_init(&shared.query_full, WARPGROUP);
        barrier_init(&shared.query_empty, 4 * GROUPS);  // a lane of each multiplying warp
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(&shared.key_full[stage], WARPGROUP), barrier_init(&shared.value_full[stage], WARPGROUP);
            barrier_init(&shared.key_empty[stage], 4 * GROUPS), barrier_init(&shared.value_empty[stage], 4 * GROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        if (queries % 1024) __trap();  // the swizzle counts from multiples of 1,024
    }
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    __syncthreads();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        load_items(shared, args, &query_map, &fresh_map, queries, ring, thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        compute_items(shared, args, queries, ring, group - 1, thread);
    }
}
