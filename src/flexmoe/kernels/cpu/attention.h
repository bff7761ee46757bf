/* Attention of one layer: norm, projections, rotation, cache write, softmax over the keys, projection back. */
#ifndef FLEXMOE_ATTENTION_H
#define FLEXMOE_ATTENTION_H
#include "prompt_attention.h"

/* Rotate `size` leading values of a head. angles: cos of the first half of the dimensions, then sin. */
static void rotate(float *head, const float *angles, int64_t size, float *copy) {
    int64_t middle = size / 2;
    const float *cos = angles, *sin = angles + middle;
    memcpy(copy, head, size * sizeof *head);
    for (int64_t i = 0; i < middle; i++) {
        head[i] = copy[i] * cos[i] - copy[i + middle] * sin[i];
        head[i + middle] = copy[i + middle] * cos[i] + copy[i] * sin[i];
    }
}

static void clip_values(float *x, int64_t size, float limit) {
    for (int64_t i = 0; i < size; i++) x[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
}

/* Norm, clip and rotate the heads of one row in place; `copy` holds a head. */
static void prepare_heads(const Layer *l, const Buffers *b, int64_t t, float *row, int64_t from, int64_t to,
                          float *copy) {
    int64_t d = l->head_dim;
    for (int64_t h = from; h < to; h++) {
        float *head = row + h * d;
        const void *weight = h < l->num_heads ? l->q_norm : l->k_norm;
        if (l->qk_norm == 1) rms_norm(head, weight, d, l->eps, (int)l->half, head);
        if (l->clip > 0) clip_values(head, d, l->clip);
        if (h < l->num_heads + l->num_kv_heads)
            rotate(head, b->angles + t * l->rotary_dim, l->rotary_dim, copy);
    }
}

/* Keys of one head are far apart, too far for the processor to foresee: ask for those to come, and for the values. */
enum { AHEAD = 8 };

/* Blocks of a prompt's rows for each thread, at least: the last of them leave others waiting. */
enum { BLOCKS_A_THREAD = 8 };

/* Queries that share the loads of keys and values, as many as there are registers for. */
enum { QUERIES = WIDTH == 16 ? 4 : 2 };

INLINE void fetch(const char *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += LINE) __builtin_prefetch(p + i);
}

/* Scores of `count` keys, `stride` bytes apart, for each query; scores[q] from `at` on. */
INLINE void score_block(const char *key, int64_t stride, const float *const *query, int64_t d, int queries, int count,
                        int half, float scale, float *const *scores, int64_t at) {
    reg sums[4 * QUERIES][PARTS];
    for (int i = 0; i < 4 * queries * PARTS; i++) sums[i / PARTS][i % PARTS] = (reg){0};
    for (int64_t i = 0; i < d; i += LANES)
        for (int p = 0; p < PARTS; p++) {
            reg keys[4];
            for (int c = 0; c < count; c++) keys[c] = load_reg(key + c * stride, i + p * WIDTH, half);
            for (int n = 0; n < queries; n++) {
                reg q = load_reg(query[n], i + p * WIDTH, 0);
                for (int c = 0; c < count; c++) sums[4 * n + c][p] += keys[c] * q;
            }
        }
    v16 sum[4 * QUERIES];
    memcpy(sum, sums, 4 * queries * sizeof *sum);
    if (queries == 4) { /* all in one: the same sums, with a third of the shuffles */
        v16 all = sum_lanes16(sum) * scale;
        for (int n = 0; n < queries; n++) memcpy(scores[n] + at, (float *)&all + 4 * n, count * sizeof **scores);
        return;
    }
    for (int n = 0; n < queries; n++) {
        v16 four = sum_lanes4(sum + 4 * n) * scale;
        memcpy(scores[n] + at, &four, count * sizeof **scores);
    }
}

/* Scores of keys [from, to) of row t's sequence for each query. */
INLINE void score_keys(const Layer *l, const Step *s, int64_t t, int64_t g, const float *const *query, int queries,
                       int64_t from, int64_t to, int half, float *const *scores) {
    int64_t d = l->head_dim, size = half ? 2 : 4, stride = 2 * l->num_kv_heads * d * size;
    int64_t values = l->num_kv_heads * d * size; /* from a key to its value */
    float scale = 1.0f / sqrtf((float)d);
    for (Run run = {0, from, 0}; run.stop < to;) {
        run = next_run(s, s->tables + t * s->table_width, run.stop, to);
        const char *key = (const char *)l->cache + run.slot * stride + g * d * size;
        int64_t j = run.key;
        for (; j + 4 <= run.stop; j += 4, key += 4 * stride) {
            for (int c = 0; c < 4; c++) fetch(key + (AHEAD + c) * stride, d * size);
            for (int c = 0; c < 4; c++) fetch(key + c * stride + values, d * size);
            score_block(key, stride, query, d, queries, 4, half, scale, scores, j);
        }
        for (; j < run.stop; j++, key += stride)
            score_block(key, stride, query, d, queries, 1, half, scale, scores, j);
    }
}

/* scores = exp(scores - largest), over [from, to); returns their sum. There is room for LANES more. */
static float soften(float *scores, int64_t from, int64_t to) {
    for (int64_t j = to; j < to + LANES; j++) scores[j] = -INFINITY;
    v16 largest = load16(scores, from, 0);
    for (int64_t j = from; j < to; j += LANES) largest = larger16(load16(scores, j, 0), largest);
    float best = largest[0];
    for (int i = 1; i < LANES; i++) best = largest[i] > best ? largest[i] : best;
    v16 total = {0};
    for (int64_t j = from; j < to; j += LANES) {
        v16 y = exp16(load16(scores, j, 0) - best);
        memcpy(scores + j, &y, sizeof y);
        total += y;
    }
    return sum16(total);
}

/* out[q] [WIDTH * blocks from `at` on] += weights[q] from `key` on, times `count` values. */
INLINE void sum_run(const char *value, int64_t stride, const float *const *weights, int queries, int64_t key,
                    int64_t count, int blocks, int half, float *const *out, int64_t at) {
    reg sums[4 * QUERIES];
    for (int n = 0; n < queries; n++)
        for (int i = 0; i < blocks; i++) sums[4 * n + i] = load_reg(out[n], at + i * WIDTH, 0);
    for (int64_t j = 0; j < count; j++, value += stride)
        for (int i = 0; i < blocks; i++) {
            reg wide = load_reg(value, i * WIDTH, half);
            for (int n = 0; n < queries; n++) sums[4 * n + i] += wide * weights[n][key + j];
        }
    for (int n = 0; n < queries; n++) memcpy(out[n] + at, sums + 4 * n, blocks * sizeof *sums);
}

/* out[q] [D] += weights[q] times values over keys [from, to) of row t's sequence. */
INLINE void sum_values(const Layer *l, const Step *s, int64_t t, int64_t g, const float *const *weights, int queries,
                       int64_t from, int64_t to, int half, float *const *out) {
    int64_t d = l->head_dim, size = half ? 2 : 4, stride = 2 * l->num_kv_heads * d * size;
    for (Run run = {0, from, 0}; run.stop < to;) {
        run = next_run(s, s->tables + t * s->table_width, run.stop, to);
        const char *value = (const char *)l->cache + run.slot * stride + (l->num_kv_heads + g) * d * size;
        int64_t count = run.stop - run.key, i = 0;
        for (; i + 4 * WIDTH <= d; i += 4 * WIDTH)
            sum_run(value + i * size, stride, weights, queries, run.key, count, 4, half, out, i);
        for (; i < d; i += WIDTH)
            sum_run(value + i * size, stride, weights, queries, run.key, count, 1, half, out, i);
    }
}

/* One row and one key head: prepare its heads, and write the new key and value. */
INLINE void write_key(const Layer *l, const Step *s, const Buffers *b, int64_t t, int64_t g, int half, float *own) {
    int64_t d = l->head_dim, group = l->num_heads / l->num_kv_heads, heads = l->num_heads, kv = l->num_kv_heads;
    float *row = b->qkv + t * (heads + 2 * kv) * d;
    prepare_heads(l, b, t, row, g * group, (g + 1) * group, own);
    prepare_heads(l, b, t, row, heads + g, heads + g + 1, own);
    float *key = row + (heads + g) * d, *value = row + (heads + kv + g) * d;
    if (l->clip > 0) clip_values(value, d, l->clip);
    int64_t to = s->lengths[t], slot = next_run(s, s->tables + t * s->table_width, to - 1, to).slot;
    for (int64_t i = 0; i < d; i++) {
        store1(l->cache, (slot * 2 * kv + g) * d + i, key[i], half);
        store1(l->cache, ((slot * 2 + 1) * kv + g) * d + i, value[i], half);
    }
}

/* `queries` rows of one sequence from t on, and one key head, whose keys are written: attend with the query heads that
 * share it. Keys that all rows see are loaded for all at once, the others for each; every row adds up in its keys' order. */
INLINE void attend(const Layer *l, const Step *s, const Buffers *b, int64_t t, int64_t g, int queries, int half,
                   float *own) {
    int64_t d = l->head_dim, group = l->num_heads / l->num_kv_heads, heads = l->num_heads;
    int64_t from = seen(l, s, t + queries - 1).key, to = seen(l, s, t).stop;
    for (int64_t h = g * group; h < (g + 1) * group; h++) {
        const float *query[QUERIES];
        float *scores[QUERIES], *out[QUERIES];
        for (int n = 0; n < queries; n++) {
            query[n] = b->qkv + (t + n) * (heads + 2 * l->num_kv_heads) * d + h * d;
            scores[n] = own + b->scores + n * b->score_size;
            out[n] = b->attended + ((t + n) * heads + h) * d;
            memset(out[n], 0, d * sizeof **out);
        }
        score_keys(l, s, t, g, query, queries, from, to, half, scores);
        float totals[QUERIES];
        for (int n = 0; n < queries; n++) {
            Run keys = seen(l, s, t + n);
            if (queries > 1) {
                score_keys(l, s, t, g, query + n, 1, keys.key, from, half, scores + n);
                score_keys(l, s, t, g, query + n, 1, to, keys.stop, half, scores + n);
            }
            totals[n] = soften(scores[n], keys.key, keys.stop);
            if (queries > 1) sum_values(l, s, t, g, (const float **)scores + n, 1, keys.key, from, half, out + n);
        }
        sum_values(l, s, t, g, (const float **)scores, queries, from, to, half, out);
        for (int n = 0; n < queries; n++) {
            if (queries > 1)
                sum_values(l, s, t, g, (const float **)scores + n, 1, to, seen(l, s, t + n).stop, half, out + n);
            for (int64_t i = 0; i < d; i++) out[n][i] /= totals[n];
        }
    }
}

/* Whether QUERIES rows from t on follow each other in one sequence and see keys in common. */
INLINE int together(const Layer *l, const Step *s, int64_t t) {
    return following(s, t, QUERIES) == QUERIES && seen(l, s, t + QUERIES - 1).key < s->lengths[t];
}

/* Rows of a prompt whose keys are written, in blocks: with as many blocks as keep all threads busy. */
static void attend_blocks(const Layer *l, const Step *s, const Buffers *b, Seat *seat) {
    int64_t kv = l->num_kv_heads, threads = seat->pool->threads, most = block_rows(l->num_heads / kv), item = 0;
    uint16_t *room = b->blocks + seat->id * b->block_size;
    while (most > 1 && s->rows * kv < most * threads * BLOCKS_A_THREAD) most /= 2;
    for (int64_t t = 0, rows; t < s->rows; t += rows) {
        rows = following(s, t, most);
        for (int64_t g = 0; g < kv; g++)
            if (item++ % threads == seat->id) attend_block(l, s, b, t, rows, g, room);
    }
}

/* The pairs of rows and key heads in turns: later rows of a prompt see more keys, and so take longer. */
INLINE void attend_rows(const Layer *l, const Step *s, const Buffers *b, int half, float *own, Seat *seat) {
    int64_t kv = l->num_kv_heads, items = s->rows * kv, threads = seat->pool->threads, item = 0;
    for (int64_t i = seat->id; i < items; i += threads) {
        write_key(l, s, b, i / kv, i % kv, half, own);
        if (!s->prompts) attend(l, s, b, i / kv, i % kv, 1, half, own);
    }
    if (!s->prompts) return;
    barrier(seat);
    if (half && b->columns) {
        attend_blocks(l, s, b, seat);
        return;
    }
    for (int64_t t = 0, queries; t < s->rows; t += queries) {
        queries = together(l, s, t) ? QUERIES : 1;
        for (int64_t g = 0; g < kv; g++) {
            if (item++ % threads != seat->id) continue;
            if (queries == 1) attend(l, s, b, t, g, 1, half, own);
            else attend(l, s, b, t, g, QUERIES, half, own);
        }
    }
}

static void attention(const Layer *l, const Step *s, const Buffers *b, Seat *seat) {
    int64_t from, to, q = l->num_heads * l->head_dim, kv = l->num_kv_heads * l->head_dim;
    float *own = b->own + seat->id * b->own_size;
    Room room = room_of(b, seat);
    norm_rows(l, s, l->input_norm, own);
    linear(&l->qkv, own, b->qkv, s->rows, 0, l->half, &room, seat);
    barrier(seat);
    if (l->qk_norm == 2) { /* over the whole projection, so before the heads are shared out */
        share(seat, s->rows, 1, &from, &to);
        for (int64_t t = from; t < to; t++) {
            float *row = b->qkv + t * l->qkv.n;
            rms_norm(row, l->q_norm, q, l->eps, (int)l->half, row);
            rms_norm(row + q, l->k_norm, kv, l->eps, (int)l->half, row + q);
        }
        barrier(seat);
    }
    if (l->half) attend_rows(l, s, b, 1, own, seat);
    else attend_rows(l, s, b, 0, own, seat);
    ask(&l->out, seat);
    barrier(seat);
    linear(&l->out, b->attended, s->x, s->rows, 1, l->half, &room, seat);
    ask(&l->dense_gate_up, seat);
    barrier(seat);
}
#endif
