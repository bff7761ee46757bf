/* Attention of prompts in the processor's bf16 units: queries, and weights of keys, are rounded to bf16, as torch does.
 *
 * Rows of one sequence go through its keys tile by tile, with the running softmax of FlashAttention (Dao et al., 2022).
 * Keys lie in columns, as in columns.h: a lane holds another key, and a score is a whole sum. Values lie in pairs of keys:
 * a lane holds another number of the head. Tiles begin at multiples of their size, so what a row adds up, and in which
 * order, depends on no other row.
 */
#ifndef FLEXMOE_PROMPT_ATTENTION_H
#define FLEXMOE_PROMPT_ATTENTION_H
#include "keys.h"

/* Keys of a tile; queries that share the loads of keys and values; queries of a block, for which a tile is packed. */
enum { KEYS = 64, SHARING = 4, BLOCK = 64 };

/* Rows of a block: with `group` query heads a key head they make about BLOCK queries. */
INLINE int64_t block_rows(int64_t group) { return group < BLOCK ? BLOCK / group : 1; }

/* Queries of a block, filled up to whole SHARING. */
INLINE int64_t block_queries(int64_t group) { return (block_rows(group) * group + SHARING - 1) / SHARING * SHARING; }

/* Numbers of a head, filled up with zeros to whole steps. */
INLINE int64_t padded(int64_t d) { return (d + STEP - 1) / STEP * STEP; }

/* One thread's memory: keys [KEYS / LANES, padded / 2, LANES, 2], values [KEYS / 2, d, 2], queries [block_queries, padded];
 * for each query its scores' largest so far, and the sums over lanes of their exponentials. In numbers of 16 bits. */
INLINE int64_t block_size(const Layer *l) {
    int64_t queries = block_queries(l->num_heads / l->num_kv_heads), d = l->head_dim;
    return KEYS * (padded(d) + d) + queries * (padded(d) + 2 + 2 * LANES + 2 * d);
}

#if BF16_UNITS
typedef struct {
    uint16_t *keys, *values, *queries;
    float *largest, *totals, *out; /* [queries], [queries, LANES], [queries, d] */
    int64_t d, group, first;       /* first: the row of the block's first query */
} Block;

INLINE Block block_of(const Layer *l, int64_t t, uint16_t *room) {
    int64_t d = l->head_dim, group = l->num_heads / l->num_kv_heads, queries = block_queries(group);
    Block b = {.d = d, .group = group, .first = t};
    b.totals = (float *)room, b.out = b.totals + queries * LANES, b.largest = b.out + queries * d;
    b.keys = (uint16_t *)(b.largest + queries), b.values = b.keys + KEYS * padded(d), b.queries = b.values + KEYS * d;
    return b;
}

INLINE __m512i load_step(const uint16_t *from, int64_t left) {
    if (!from) return _mm512_setzero_si512();
    return left >= STEP ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(ALL >> (STEP - left), from);
}

/* Round `queries` heads of a block to bf16, and forget what was summed. */
static void begin_block(const Layer *l, const Buffers *buffers, Block *b, int64_t g, int64_t queries) {
    for (int64_t q = 0; q < block_queries(b->group); q++) {
        int64_t from = q < queries ? q : queries - 1; /* the last one again, for nobody */
        const float *head = buffers->qkv + (b->first + from / b->group) * l->qkv.n + (g * b->group + from % b->group) * b->d;
        for (int64_t i = 0; i < b->d; i += STEP)
            store_step(b->queries + q * padded(b->d) + i, (reg)load_floats(head + i, b->d - i),
                       (reg)load_floats(head + i + LANES, b->d - i - LANES));
        b->largest[q] = -INFINITY;
        memset(b->totals + q * LANES, 0, LANES * sizeof *b->totals);
        memset(b->out + q * b->d, 0, b->d * sizeof *b->out);
    }
}

/* Bring keys and values [from, to) of the rows' sequence, at most KEYS, into the block's memory; zeros fill it up. */
static void pack_tile(const Layer *l, const Step *s, Block *b, int64_t g, int64_t from, int64_t to) {
    const uint16_t *keys[KEYS] = {NULL}, *values[KEYS] = {NULL};
    int64_t d = b->d, kv = l->num_kv_heads;
    for (Run run = {0, from, 0}; run.stop < to;) {
        run = next_run(s, s->tables + b->first * s->table_width, run.stop, to);
        for (int64_t j = run.key; j < run.stop; j++) {
            keys[j - from] = (const uint16_t *)l->cache + ((run.slot + j - run.key) * 2 * kv + g) * d;
            values[j - from] = keys[j - from] + kv * d;
        }
    }
    for (int64_t j = 0; j < to - from; j += LANES)
        for (int64_t i = 0; i < d; i += STEP) {
            __m512i rows[LANES];
            for (int t = 0; t < LANES; t++) rows[t] = load_step(keys[j + t] ? keys[j + t] + i : NULL, d - i);
            to_pairs(rows, b->keys + j * padded(d) + i * LANES);
        }
    for (int64_t j = 0; j < (to - from + LANES - 1) / LANES * LANES; j += 2)
        for (int64_t i = 0; i < d; i += LANES) {
            __m256i none = _mm256_setzero_si256();
            __m256i even = values[j] ? _mm256_loadu_si256((const __m256i *)(values[j] + i)) : none;
            __m256i odd = values[j + 1] ? _mm256_loadu_si256((const __m256i *)(values[j + 1] + i)) : none;
            __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
            _mm512_storeu_si512(b->values + j * d + 2 * i, pairs);
        }
}

/* Two numbers of bf16 in all lanes. */
INLINE __m512bh both(const uint16_t *pair) {
    int bits;
    memcpy(&bits, pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

/* scores[n][key] of SHARING queries and `groups` times LANES keys. */
INLINE void score_tile(const Block *b, const uint16_t *queries, int groups, v16 (*scores)[KEYS / LANES]) {
    __m512 sums[SHARING][KEYS / LANES];
    int64_t size = padded(b->d);
    for (int n = 0; n < SHARING; n++)
        for (int c = 0; c < groups; c++) sums[n][c] = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 2) {
        __m512bh keys[KEYS / LANES];
        for (int c = 0; c < groups; c++) keys[c] = (__m512bh)_mm512_loadu_si512(b->keys + (c * size + i) * LANES);
        for (int n = 0; n < SHARING; n++) {
            __m512bh query = both(queries + n * size + i);
            for (int c = 0; c < groups; c++) sums[n][c] = _mm512_dpbf16_ps(sums[n][c], keys[c], query);
        }
    }
    for (int n = 0; n < SHARING; n++)
        for (int c = 0; c < groups; c++) scores[n][c] = (v16)sums[n][c];
}

/* Turn scores of keys from `from` on into their weights, of those in `keys` alone, rounded to bf16; `total` takes them up.
 * Returns what the sums so far are to be multiplied with. */
INLINE float weigh_tile(v16 *scores, int groups, float scale, Run keys, int64_t from, float *largest, float *total,
                        uint16_t *weights) {
    const v16i lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int first = (int)(keys.key - from), stop = (int)(keys.stop - from < KEYS ? keys.stop - from : KEYS);
    v16 all = (v16){0} - INFINITY, sum = load16(total, 0, 0);
    for (int c = 0; c < groups; c++) {
        v16i key = lane + c * LANES;
        scores[c] = select16((v16u)((key >= first) & (key < stop)), scores[c] * scale, (v16){0} - INFINITY);
        all = larger16(scores[c], all);
    }
    float best = *largest;
    for (int i = 0; i < LANES; i++) best = all[i] > best ? all[i] : best;
    float origin = best == -INFINITY ? 0.0f : best; /* none is seen yet, and the largest stays open */
    float factor = exp16((v16){0} + (*largest - origin))[0];
    sum *= factor;
    for (int c = 0; c < KEYS / LANES; c += 2) {
        v16 two[2] = {{0}, {0}};
        for (int i = 0; i < 2; i++)
            if (c + i < groups) sum += two[i] = exp16(scores[c + i] - origin);
        store_step(weights + c * LANES, (reg)two[0], (reg)two[1]);
    }
    memcpy(total, &sum, sizeof sum);
    *largest = best;
    return factor;
}

/* out[n] [blocks * LANES from `at` on] = out * factor + weights times values, of SHARING queries and `keys` keys. */
INLINE void add_values(const Block *b, const uint16_t (*weights)[KEYS], const float *factors, int64_t keys, int blocks,
                       int64_t at, float *out) {
    __m512 sums[SHARING][4];
    for (int n = 0; n < SHARING; n++)
        for (int c = 0; c < blocks; c++)
            sums[n][c] = _mm512_loadu_ps(out + n * b->d + at + c * LANES) * _mm512_set1_ps(factors[n]);
    for (int64_t j = 0; j < keys; j += 2) {
        __m512bh values[4];
        for (int c = 0; c < blocks; c++)
            values[c] = (__m512bh)_mm512_loadu_si512(b->values + j * b->d + 2 * (at + c * LANES));
        for (int n = 0; n < SHARING; n++) {
            __m512bh weight = both(weights[n] + j);
            for (int c = 0; c < blocks; c++) sums[n][c] = _mm512_dpbf16_ps(sums[n][c], values[c], weight);
        }
    }
    for (int n = 0; n < SHARING; n++)
        for (int c = 0; c < blocks; c++) _mm512_storeu_ps(out + n * b->d + at + c * LANES, sums[n][c]);
}

/* The tile at `from` for SHARING queries from q on; rows of the block end with `last`. */
INLINE void attend_tile(const Layer *l, const Step *s, Block *b, int64_t q, int64_t last, int64_t from, int groups) {
    v16 scores[SHARING][KEYS / LANES];
    uint16_t weights[SHARING][KEYS];
    float factors[SHARING], scale = 1.0f / sqrtf((float)b->d), *out = b->out + q * b->d;
    if (groups == 1) score_tile(b, b->queries + q * padded(b->d), 1, scores);
    else if (groups == 2) score_tile(b, b->queries + q * padded(b->d), 2, scores);
    else if (groups == 3) score_tile(b, b->queries + q * padded(b->d), 3, scores);
    else score_tile(b, b->queries + q * padded(b->d), 4, scores);
    for (int n = 0; n < SHARING; n++) {
        int64_t row = b->first + (q + n) / b->group;
        factors[n] = weigh_tile(scores[n], groups, scale, seen(l, s, row < last ? row : last), from, b->largest + q + n,
                                b->totals + (q + n) * LANES, weights[n]);
    }
    int64_t at = 0, keys = groups * LANES;
    for (; at + 4 * LANES <= b->d; at += 4 * LANES)
        add_values(b, (const uint16_t (*)[KEYS])weights, factors, keys, 4, at, out);
    for (; at < b->d; at += LANES) add_values(b, (const uint16_t (*)[KEYS])weights, factors, keys, 1, at, out);
}

/* Rows [t, t + rows) of one sequence, at most block_rows of them, with the query heads of key head g. */
static void attend_block(const Layer *l, const Step *s, const Buffers *buffers, int64_t t, int64_t rows, int64_t g,
                         uint16_t *room) {
    Block b = block_of(l, t, room);
    int64_t queries = rows * b.group, last = t + rows - 1, to = seen(l, s, last).stop;
    begin_block(l, buffers, &b, g, queries);
    for (int64_t from = seen(l, s, t).key / KEYS * KEYS; from < to; from += KEYS) {
        int64_t stop = from + KEYS < to ? from + KEYS : to;
        pack_tile(l, s, &b, g, from, stop);
        for (int64_t q = 0; q < queries; q += SHARING) {
            int64_t end = q + SHARING < queries ? q + SHARING : queries; /* its rows see [some key, `most`) */
            int64_t most = seen(l, s, t + (end - 1) / b.group).stop;
            if (most <= from) continue;
            if (most > stop) most = stop;
            attend_tile(l, s, &b, q, last, from, (int)((most - from + LANES - 1) / LANES));
        }
    }
    for (int64_t q = 0; q < queries; q++) {
        float *to_row = buffers->attended + ((t + q / b.group) * l->num_heads + g * b.group + q % b.group) * b.d;
        float total = sum16(load16(b.totals, q * LANES, 0));
        for (int64_t i = 0; i < b.d; i++) to_row[i] = b.out[q * b.d + i] / total;
    }
}
#else
INLINE void attend_block(const Layer *l, const Step *s, const Buffers *buffers, int64_t t, int64_t rows, int64_t g,
                         uint16_t *room) {
    (void)l, (void)s, (void)buffers, (void)t, (void)rows, (void)g, (void)room;
}
#endif
#endif
