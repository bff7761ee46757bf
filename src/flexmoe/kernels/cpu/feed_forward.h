/* The feed-forward of one layer: router and experts, or dense, or experts with a shared one. */
#ifndef FLEXMOE_FEED_FORWARD_H
#define FLEXMOE_FEED_FORWARD_H
#include "products.h"

/* Softmax over all experts, then the K best, the lower id first among equals; physical slots into `slots`. */
static void choose_experts(const Layer *l, const Step *s, const Buffers *b, int64_t t) {
    float *p = b->logits + t * l->num_experts, best = -INFINITY, total = 0.0f, kept = 0.0f;
    for (int64_t e = 0; e < l->num_experts; e++) best = p[e] > best ? p[e] : best;
    for (int64_t e = 0; e < l->num_experts; e++) total += p[e] = expf(p[e] - best);
    for (int64_t k = 0; k < l->top_k; k++) {
        int64_t chosen = 0;
        for (int64_t e = 1; e < l->num_experts; e++)
            if (p[e] > p[chosen]) chosen = e;
        int64_t at = t * l->top_k + k;
        s->topk_ids[at] = chosen;
        b->slots[at] = l->slot_of[chosen];
        s->topk_weights[at] = p[chosen] / total;
        kept += s->topk_weights[at];
        p[chosen] = -1.0f;
    }
    for (int64_t k = 0; k < l->top_k; k++) {
        if (l->renormalize) s->topk_weights[t * l->top_k + k] /= kept;
        b->weights[t * l->top_k + k] = s->topk_weights[t * l->top_k + k];
    }
}

/* Counting sort of the assignments by slot. */
static void sort_assignments(const Layer *l, const Step *s, const Buffers *b) {
    int64_t total = s->rows * l->top_k, slots = l->num_slots;
    memset(b->first, 0, (slots + 1) * sizeof *b->first);
    for (int64_t a = 0; a < total; a++) b->first[b->slots[a] + 1]++;
    for (int64_t e = 0; e < slots; e++) b->first[e + 1] += b->first[e];
    for (int64_t a = 0; a < total; a++) b->assignment[b->first[b->slots[a]]++] = (int32_t)a;
    for (int64_t e = slots; e > 0; e--) b->first[e] = b->first[e - 1];
    b->first[0] = 0;
}

/* The tile's activations: of each assignment the row of x [., k] that it reads. of_token: one a token. */
INLINE void gather(Tile *tile, const Layer *l, const int32_t *assigned, const float *x, int64_t k, int of_token) {
    for (int64_t j = 0; j < tile->count; j++) tile->x[j] = x + (of_token ? assigned[j] / l->top_k : assigned[j]) * k;
}

/* hidden[a] = silu(gate) * up for width columns [from, to) of each assignment of expert e. x: normed rows. */
static void expert_up(const Layer *l, const Buffers *b, int64_t e, const float *x, int64_t from, int64_t to,
                      const Room *room) {
    float gate[ROWS * COLUMNS] = {0}, up[ROWS * COLUMNS] = {0}, out[ROWS * COLUMNS];
    Tile tile;
    int64_t width = l->expert_width, k = l->hidden, left = b->first[e + 1] - b->first[e];
    for (const int32_t *assigned = b->assignment + b->first[e]; left; left -= tile.count, assigned += tile.count) {
        begin_tile(&tile, left, k, l->gate_up.format, room);
        gather(&tile, l, assigned, x, k, 1);
        prepare(&tile, k, l->gate_up.format, room);
        for (int64_t f = from; f < to; f += ROWS) {
            int rows = to - f < ROWS ? (int)(to - f) : ROWS;
            int64_t format = l->gate_up.format, same = format;
            Rows gates = ready(rows_at(&l->gate_up, e * 2 * width + f), k, rows, 0, &format, room);
            Rows ups = ready(rows_at(&l->gate_up, (e * 2 + 1) * width + f), k, rows, 1, &same, room);
            for (int64_t t = 0, tokens; t < tile.count; t += tokens) {
                tokens = take_tokens(&tile, t, format);
                dots(gates, k, &tile, t, rows, (int)tokens, format, room, gate);
                dots(ups, k, &tile, t, rows, (int)tokens, format, room, up);
                for (int64_t j = 0; j < tokens * ROWS; j += LANES) swiglu(gate + j, up + j, 1.0f, out + j);
                for (int j = 0; j < tokens; j++) {
                    float *hidden = b->hidden + assigned[t + j] * width + f;
                    if (rows == ROWS) memcpy(hidden, out + j * ROWS, ROWS * sizeof *out); /* one store */
                    else memcpy(hidden, out + j * ROWS, rows * sizeof *out);
                }
            }
        }
    }
}

/* x += weight * value, of `count` columns. */
INLINE void add_scaled(float *x, const float *value, float weight, int count) {
    float sum[ROWS];
    if (count < ROWS) {
        for (int r = 0; r < count; r++) x[r] += weight * value[r];
        return;
    }
    for (int r = 0; r < ROWS; r++) sum[r] = x[r] + weight * value[r];
    memcpy(x, sum, sizeof sum);
}

/* x[t] += weight * down(hidden) for hidden columns [from, to) of expert e. */
static void expert_down(const Layer *l, const Step *s, const Buffers *b, int64_t e, int64_t from, int64_t to,
                        const Room *room) {
    float out[ROWS * COLUMNS] = {0};
    Tile tile;
    int64_t width = l->expert_width, left = b->first[e + 1] - b->first[e];
    for (const int32_t *assigned = b->assignment + b->first[e]; left; left -= tile.count, assigned += tile.count) {
        begin_tile(&tile, left, width, l->down.format, room);
        gather(&tile, l, assigned, b->hidden, width, 0);
        prepare(&tile, width, l->down.format, room);
        for (int64_t h = from; h < to; h += ROWS) {
            int rows = to - h < ROWS ? (int)(to - h) : ROWS;
            int64_t format = l->down.format;
            Rows w = ready(rows_at(&l->down, e * l->hidden + h), width, rows, 0, &format, room);
            for (int64_t t = 0, tokens; t < tile.count; t += tokens) {
                tokens = take_tokens(&tile, t, format);
                dots(w, width, &tile, t, rows, (int)tokens, format, room, out);
                for (int j = 0; j < tokens; j++) {
                    int32_t a = assigned[t + j];
                    add_scaled(s->x + a / l->top_k * l->hidden + h, out + j * ROWS, b->weights[a], rows);
                }
            }
        }
    }
}

enum { SHARED_ROUTING = 512 }; /* probabilities from which sharing them out is worth a barrier */

/* Ask for the first rows of the first expert that has some. */
static void ask_experts(const Layer *l, const Buffers *b, const Linear *stack, int64_t rows, int64_t from, int64_t to) {
    int64_t e = 0;
    while (e < l->num_slots && b->first[e] == b->first[e + 1]) e++;
    if (e < l->num_slots) ask_rows(stack, e * rows + from, e * rows + to);
}

static void experts(const Layer *l, const Step *s, const Buffers *b, const float *normed, const Linear *next,
                  Seat *seat) {
    int64_t from, to, width = l->expert_width;
    Linear router = {l->router, NULL, NULL, l->num_experts, l->hidden, F32};
    Room room = room_of(b, seat);
    linear(&router, normed, b->logits, s->rows, 0, 0, &room, seat);
    barrier(seat);
    int together = s->rows * l->num_experts > SHARED_ROUTING;
    share(seat, s->rows, 1, &from, &to);
    if (!together) from = 0, to = seat->id == 0 ? s->rows : 0;
    for (int64_t t = from; t < to; t++) choose_experts(l, s, b, t);
    if (together) barrier(seat);
    if (seat->id == 0) sort_assignments(l, s, b);
    barrier(seat);
    /* A share of each expert's columns: experts with many rows then take all threads equally long. */
    share(seat, width, ROWS, &from, &to);
    ask_experts(l, b, &l->gate_up, 2 * width, from, to);
    for (int64_t e = 0; e < l->num_slots; e++) expert_up(l, b, e, normed, from, to, &room);
    share(seat, l->hidden, ROWS, &from, &to);
    ask_experts(l, b, &l->down, l->hidden, from, to);
    barrier(seat);
    for (int64_t e = 0; e < l->num_slots; e++) expert_down(l, s, b, e, from, to, &room); /* sums in ascending slots */
    ask(next, seat);
    barrier(seat);
}

/* out [n] = silu(gate [n]) * up [n] * scale. */
static void swiglu_row(const float *gate, const float *up, int64_t n, float scale, float *out) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) swiglu(gate + i, up + i, scale, out + i);
    if (i == n) return;
    float rest[3][LANES] = {{0}};
    memcpy(rest[0], gate + i, (n - i) * sizeof *gate);
    memcpy(rest[1], up + i, (n - i) * sizeof *up);
    swiglu(rest[0], rest[1], scale, rest[2]);
    memcpy(out + i, rest[2], (n - i) * sizeof *out);
}

/* The dense feed-forward, or the shared expert with its sigmoid gate. */
static void dense(const Layer *l, const Step *s, const Buffers *b, const float *normed, const Linear *next,
                  Seat *seat) {
    int64_t from, to, width = l->dense_width, half = l->half;
    Room room = room_of(b, seat);
    float *both = b->dense_hidden, *hidden = both + s->rows * 2 * width; /* [T, 2F], [T, F] */
    linear(&l->dense_gate_up, normed, both, s->rows, 0, half, &room, seat);
    if (l->dense_gate.weight && seat->id == 0)
        linear_rows(&l->dense_gate, normed, b->gate, s->rows, 0, (int)half, 0, 1, &room);
    barrier(seat);
    share(seat, width, LANES, &from, &to);
    for (int64_t t = 0; t < s->rows; t++) {
        float scale = l->dense_gate.weight ? 1.0f / (1.0f + expf(-b->gate[t])) : 1.0f;
        const float *gate = both + t * 2 * width + from;
        swiglu_row(gate, gate + width, to - from, scale, hidden + t * width + from);
    }
    ask(&l->dense_down, seat);
    barrier(seat);
    linear(&l->dense_down, hidden, s->x, s->rows, 1, half, &room, seat);
    ask(next, seat);
    barrier(seat);
}

/* next: weights that come after this layer's. */
static void feed_forward(const Layer *l, const Step *s, const Buffers *b, const Linear *next, Seat *seat) {
    float *normed = b->own + seat->id * b->own_size;
    norm_rows(l, s, l->mlp_norm, normed); /* both kinds have a barrier before any thread writes x */
    if (l->num_experts) experts(l, s, b, normed, l->dense_width ? &l->dense_gate_up : next, seat);
    if (l->dense_width) dense(l, s, b, normed, next, seat);
}
#endif
