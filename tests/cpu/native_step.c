/* A small model of fixed numbers through decode.c, as a program: for processors that are only emulated here.
 *
 * Prints the logits of a decode step and of a prompt, for weights of each format. Ends with status 1 if a row's bits depend
 * on the rows beside it, or on the number of threads.
 */
#include <stdio.h>

#include "decode.c"

enum { HIDDEN = 67, HEADS = 4, KV = 2, DIM = 16, EXPERTS = 5, TOP_K = 2, FFN = 37, VOCAB = 21, MOST = 9, LENGTH = 6 };

static uint32_t state;

static float draw(void) {
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (float)(1 << 23) - 1.0f;
}

static void *place(size_t size) {
    void *memory = calloc(1, size + 64);
    if (!memory) exit(2);
    return memory;
}

/* Numbers in fp32 or bf16. */
static void *numbers(int64_t count, int half, float mean, float scale) {
    void *memory = place(count * 4);
    for (int64_t i = 0; i < count; i++) store1(memory, i, mean + scale * draw(), half);
    return memory;
}

static Linear matrix(int64_t n, int64_t k, int64_t stack, int format) {
    Linear l = {NULL, NULL, NULL, n, k, format};
    if (format <= BF16) {
        l.weight = numbers(stack * n * k, format, 0.0f, 0.2f);
        return l;
    }
    uint8_t *codes = place(stack * n * row_bytes(k, format));
    for (int64_t i = 0; i < stack * n * row_bytes(k, format); i++)
        codes[i] = format == INT8 ? (uint8_t)(int8_t)(127.0f * draw()) : (uint8_t)(128.0f + 127.0f * draw());
    l.weight = codes;
    l.scales = numbers(stack * n * groups(k), 1, 0.2f / (format == INT8 ? 127.0f : 7.0f), 0.0005f);
    return l;
}

static void *cache_of(int half) { return numbers((MOST + 1) * LENGTH * 2 * KV * DIM, half, 0.0f, 1.0f); }

static Layer layer_of(int format, int half) {
    static int64_t slot_of[EXPERTS] = {3, 1, 4, 0, 2};
    Layer l = {.half = half, .hidden = HIDDEN, .num_heads = HEADS, .num_kv_heads = KV, .head_dim = DIM,
               .rotary_dim = DIM, .num_experts = EXPERTS, .num_slots = EXPERTS, .top_k = TOP_K,
               .expert_width = FFN, .renormalize = 1, .dense_width = FFN, .eps = 1e-5f, .slot_of = slot_of};
    l.input_norm = numbers(HIDDEN, half, 1.0f, 0.2f);
    l.mlp_norm = numbers(HIDDEN, half, 1.0f, 0.2f);
    l.qkv = matrix((HEADS + 2 * KV) * DIM, HIDDEN, 1, format);
    l.out = matrix(HIDDEN, HEADS * DIM, 1, format);
    l.router = numbers(EXPERTS * HIDDEN, 0, 0.0f, 1.0f);
    l.gate_up = matrix(2 * FFN, HIDDEN, EXPERTS, format);
    l.down = matrix(HIDDEN, FFN, EXPERTS, format);
    l.dense_gate_up = matrix(2 * FFN, HIDDEN, 1, format);
    l.dense_down = matrix(HIDDEN, FFN, 1, format);
    l.dense_gate = matrix(1, HIDDEN, 1, format);
    l.cache = cache_of(half);
    return l;
}

/* Logits [rows, V] of rows [first, first + rows): decodes of sequences in blocks of their own, or one prompt. */
static void step(Pool *pool, const Model *m, int64_t first, int64_t rows, int prompts, float *logits) {
    int64_t ids[MOST], samples[MOST], topk_ids[MOST * TOP_K];
    int32_t tables[MOST], lengths[MOST];
    float x[MOST * HIDDEN], topk_weights[MOST * TOP_K];
    for (int64_t t = 0; t < rows; t++) {
        ids[t] = (first + t) * 5 % VOCAB, samples[t] = t;
        tables[t] = prompts ? MOST : (int32_t)(first + t);
        lengths[t] = (int32_t)(prompts ? first + t + 1 : 1 + (first + t) % LENGTH);
    }
    Step s = {rows, LENGTH, 1, prompts, rows, ids, tables, lengths, samples, x, logits, topk_ids, topk_weights,
              0, m->num_layers, EMBED | ATTEND | FEED | HEAD};
    if (fm_step(pool, m, &s)) exit(2);
}

static void run_format(int format) {
    int half = format > F32;
    state = 7;
    Layer layers[2] = {layer_of(format, half), layer_of(format, half)};
    Model m = {half, HIDDEN, 2, matrix(VOCAB, HIDDEN, 1, format), numbers(HIDDEN, half, 1.0f, 0.2f),
               matrix(VOCAB, HIDDEN, 1, format), {0}, numbers(DIM / 2, 0, 0.5f, 0.3f), 1.0f, 1e-5f, layers};
    Pool *pools[2] = {fm_pool(1), fm_pool(3)};
    for (int prompts = 0; prompts < 2; prompts++) {
        int64_t rows = prompts ? LENGTH : MOST;
        float together[MOST * VOCAB], alone[MOST * VOCAB];
        for (int64_t t = 0; t < rows; t++) step(pools[0], &m, t, 1, prompts, alone + t * VOCAB);
        for (int p = 0; p < 2; p++) {
            step(pools[p], &m, 0, rows, prompts, together);
            if (memcmp(together, alone, rows * VOCAB * sizeof *alone)) exit(1);
        }
        for (int64_t i = 0; i < rows * VOCAB; i++) printf("%.9g\n", (double)alone[i]);
    }
}

int main(void) {
    for (int format = F32; format <= INT4; format++) run_format(format);
    return 0;
}
