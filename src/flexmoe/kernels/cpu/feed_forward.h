/* The feed-forward of one layer: router and experts, or dense, or experts with a shared one. */
#ifndef FLEXMOE_FEED_FORWARD_H
#define FLEXMOE_FEED_FORWARD_H
#include "vector.h"

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

/* hidden[a] = silu(gate) * up for width columns [from, to) of each assignment of one expert. x: normed rows. */
INLINE void expert_up(const char *gate_up, int64_t width, int64_t k, const float *x, const int32_t *assigned,
                      int64_t count, int32_t top_k, float *hidden, int64_t from, int64_t to, int half) {
    float gate[ROWS * TOKENS], up[ROWS * TOKENS];
    const float *block[TOKENS];
    int64_t row_bytes = k * (half ? 2 : 4);
    for (int64_t f = from; f < to; f += ROWS) {
        int rows = to - f < ROWS ? (int)(to - f) : ROWS;
        for (int64_t i = 0, tokens; i < count; i += tokens) {
            tokens = take_tokens(count - i, half);
            for (int j = 0; j < tokens; j++) block[j] = x + assigned[i + j] / top_k * k;
            dots(gate_up + f * row_bytes, k, block, rows, (int)tokens, half, gate);
            dots(gate_up + (width + f) * row_bytes, k, block, rows, (int)tokens, half, up);
            for (int j = 0; j < tokens; j++)
                for (int r = 0; r < rows; r++)
                    hidden[assigned[i + j] * width + f + r] = silu(gate[j * ROWS + r]) * up[j * ROWS + r];
        }
    }
}

/* x[t] += weight * down(hidden) for hidden columns [from, to); experts in ascending slots. */
INLINE void expert_down(const Layer *l, const Step *s, const Buffers *b, int64_t from, int64_t to, int half) {
    float out[ROWS * TOKENS];
    const float *block[TOKENS];
    int64_t width = l->expert_width, row_bytes = width * (half ? 2 : 4);
    int32_t top_k = (int32_t)l->top_k;
    for (int64_t e = 0; e < l->num_slots; e++) {
        const int32_t *assigned = b->assignment + b->first[e];
        int64_t count = b->first[e + 1] - b->first[e];
        const char *down = (const char *)l->down + e * l->hidden * row_bytes;
        for (int64_t h = from; count && h < to; h += ROWS) {
            int rows = to - h < ROWS ? (int)(to - h) : ROWS;
            for (int64_t i = 0, tokens; i < count; i += tokens) {
                tokens = take_tokens(count - i, half);
                for (int j = 0; j < tokens; j++) block[j] = b->hidden + assigned[i + j] * width;
                dots(down + h * row_bytes, width, block, rows, (int)tokens, half, out);
                for (int j = 0; j < tokens; j++) {
                    float *x = s->x + assigned[i + j] / top_k * l->hidden + h, weight = b->weights[assigned[i + j]];
                    for (int r = 0; r < rows; r++) x[r] += weight * out[j * ROWS + r];
                }
            }
        }
    }
}

enum { SHARED_ROUTING = 512 }; /* probabilities from which sharing them out is worth a barrier */

static void experts(const Layer *l, const Step *s, const Buffers *b, const float *normed, Seat *seat) {
    int64_t from, to, width = l->expert_width, row_bytes = l->hidden * (l->half ? 2 : 4);
    linear((Linear){l->router, NULL, l->num_experts, l->hidden}, normed, b->logits, s->rows, 0, 0, seat);
    barrier(seat);
    int together = s->rows * l->num_experts > SHARED_ROUTING;
    share(seat, s->rows, 1, &from, &to);
    if (!together) from = 0, to = seat->id == 0 ? s->rows : 0;
    for (int64_t t = from; t < to; t++) choose_experts(l, s, b, t);
    if (together) barrier(seat);
    if (seat->id == 0) sort_assignments(l, s, b);
    barrier(seat);
    /* The columns of all experts that any row chose, shared out as one long line. */
    int64_t active = 0, place = 0;
    for (int64_t e = 0; e < l->num_slots; e++) active += b->first[e + 1] > b->first[e];
    share(seat, active * width, ROWS, &from, &to);
    for (int64_t e = 0; e < l->num_slots; e++) {
        int64_t count = b->first[e + 1] - b->first[e];
        if (!count) continue;
        int64_t start = from > place ? from - place : 0, stop = to - place < width ? to - place : width;
        const char *gate_up = (const char *)l->gate_up + e * 2 * width * row_bytes;
        const int32_t *assigned = b->assignment + b->first[e];
        if (start < stop && l->half)
            expert_up(gate_up, width, l->hidden, normed, assigned, count, (int32_t)l->top_k, b->hidden, start, stop, 1);
        else if (start < stop)
            expert_up(gate_up, width, l->hidden, normed, assigned, count, (int32_t)l->top_k, b->hidden, start, stop, 0);
        place += width;
    }
    barrier(seat);
    share(seat, l->hidden, ROWS, &from, &to);
    if (l->half) expert_down(l, s, b, from, to, 1);
    else expert_down(l, s, b, from, to, 0);
    barrier(seat);
}

/* The dense feed-forward, or the shared expert with its sigmoid gate. */
static void dense(const Layer *l, const Step *s, const Buffers *b, const float *normed, Seat *seat) {
    int64_t from, to, width = l->dense_width, half = l->half;
    float *both = b->dense_hidden; /* [T, 2F], then silu(gate) * up in its first half's place */
    linear(l->dense_gate_up, normed, both, s->rows, 0, (int)half, seat);
    if (l->dense_gate.weight && seat->id == 0) linear_rows(l->dense_gate, normed, b->gate, s->rows, 0, (int)half, 0, 1);
    barrier(seat);
    float *hidden = both + s->rows * 2 * width; /* [T, F] */
    share(seat, s->rows * width, LANES, &from, &to);
    for (int64_t i = from; i < to; i++) {
        int64_t t = i / width, f = i % width;
        float scale = l->dense_gate.weight ? 1.0f / (1.0f + expf(-b->gate[t])) : 1.0f;
        hidden[i] = silu(both[t * 2 * width + f]) * both[t * 2 * width + width + f] * scale;
    }
    barrier(seat);
    linear(l->dense_down, hidden, s->x, s->rows, 1, (int)half, seat);
    barrier(seat);
}

static void feed_forward(const Layer *l, const Step *s, const Buffers *b, Seat *seat) {
    float *normed = b->own + seat->id * b->own_size;
    norm_rows(l, s, l->mlp_norm, normed); /* both kinds have a barrier before any thread writes x */
    if (l->num_experts) experts(l, s, b, normed, seat);
    if (l->dense_width) dense(l, s, b, normed, seat);
}
#endif
