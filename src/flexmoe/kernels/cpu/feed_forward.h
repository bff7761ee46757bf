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

/* hidden[a] = silu(gate) * up for width columns [from, to) of each assignment of expert e. x: normed rows. */
static void expert_up(const Layer *l, const Buffers *b, int64_t e, const float *x, int64_t from, int64_t to) {
    float gate[ROWS * TOKENS], up[ROWS * TOKENS];
    const float *block[TOKENS];
    const int32_t *assigned = b->assignment + b->first[e];
    int64_t count = b->first[e + 1] - b->first[e], width = l->expert_width, k = l->hidden, format = l->gate_up.format;
    for (int64_t f = from; f < to; f += ROWS) {
        int rows = to - f < ROWS ? (int)(to - f) : ROWS;
        Rows gate_rows = rows_at(&l->gate_up, e * 2 * width + f), up_rows = rows_at(&l->gate_up, (e * 2 + 1) * width + f);
        for (int64_t i = 0, tokens; i < count; i += tokens) {
            tokens = take_tokens(count - i, format);
            for (int j = 0; j < tokens; j++) block[j] = x + assigned[i + j] / l->top_k * k;
            dots(gate_rows, k, block, rows, (int)tokens, format, gate);
            dots(up_rows, k, block, rows, (int)tokens, format, up);
            for (int j = 0; j < tokens; j++)
                for (int r = 0; r < rows; r++)
                    b->hidden[assigned[i + j] * width + f + r] = silu(gate[j * ROWS + r]) * up[j * ROWS + r];
        }
    }
}

/* x[t] += weight * down(hidden) for hidden columns [from, to); experts in ascending slots. */
static void expert_down(const Layer *l, const Step *s, const Buffers *b, int64_t from, int64_t to) {
    float out[ROWS * TOKENS];
    const float *block[TOKENS];
    int64_t width = l->expert_width, format = l->down.format;
    for (int64_t e = 0; e < l->num_slots; e++) {
        const int32_t *assigned = b->assignment + b->first[e];
        int64_t count = b->first[e + 1] - b->first[e];
        for (int64_t h = from; count && h < to; h += ROWS) {
            int rows = to - h < ROWS ? (int)(to - h) : ROWS;
            for (int64_t i = 0, tokens; i < count; i += tokens) {
                tokens = take_tokens(count - i, format);
                for (int j = 0; j < tokens; j++) block[j] = b->hidden + assigned[i + j] * width;
                dots(rows_at(&l->down, e * l->hidden + h), width, block, rows, (int)tokens, format, out);
                for (int j = 0; j < tokens; j++) {
                    float *x = s->x + assigned[i + j] / l->top_k * l->hidden + h, weight = b->weights[assigned[i + j]];
                    for (int r = 0; r < rows; r++) x[r] += weight * out[j * ROWS + r];
                }
            }
        }
    }
}

enum { SHARED_ROUTING = 512 }; /* probabilities from which sharing them out is worth a barrier */

static void experts(const Layer *l, const Step *s, const Buffers *b, const float *normed, Seat *seat) {
    int64_t from, to, width = l->expert_width;
    Linear router = {l->router, NULL, NULL, l->num_experts, l->hidden, F32};
    linear(&router, normed, b->logits, s->rows, 0, 0, seat);
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
        if (b->first[e + 1] == b->first[e]) continue;
        int64_t start = from > place ? from - place : 0, stop = to - place < width ? to - place : width;
        if (start < stop) expert_up(l, b, e, normed, start, stop);
        place += width;
    }
    barrier(seat);
    share(seat, l->hidden, ROWS, &from, &to);
    expert_down(l, s, b, from, to);
    barrier(seat);
}

/* The dense feed-forward, or the shared expert with its sigmoid gate. */
static void dense(const Layer *l, const Step *s, const Buffers *b, const float *normed, Seat *seat) {
    int64_t from, to, width = l->dense_width, half = l->half;
    float *both = b->dense_hidden; /* [T, 2F], then silu(gate) * up in its first half's place */
    linear(&l->dense_gate_up, normed, both, s->rows, 0, half, seat);
    if (l->dense_gate.weight && seat->id == 0) linear_rows(&l->dense_gate, normed, b->gate, s->rows, 0, (int)half, 0, 1);
    barrier(seat);
    float *hidden = both + s->rows * 2 * width; /* [T, F] */
    share(seat, s->rows * width, LANES, &from, &to);
    for (int64_t i = from; i < to; i++) {
        int64_t t = i / width, f = i % width;
        float scale = l->dense_gate.weight ? 1.0f / (1.0f + expf(-b->gate[t])) : 1.0f;
        hidden[i] = silu(both[t * 2 * width + f]) * both[t * 2 * width + width + f] * scale;
    }
    barrier(seat);
    linear(&l->dense_down, hidden, s->x, s->rows, 1, half, seat);
    barrier(seat);
}

static void feed_forward(const Layer *l, const Step *s, const Buffers *b, Seat *seat) {
    float *normed = b->own + seat->id * b->own_size;
    norm_rows(l, s, l->mlp_norm, normed); /* both kinds have a barrier before any thread writes x */
    if (l->num_experts) experts(l, s, b, normed, seat);
    if (l->dense_width) dense(l, s, b, normed, seat);
}
#endif
