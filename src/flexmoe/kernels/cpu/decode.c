/* Steps of a decoder-only transformer on a CPU, through whole layers: decodes, few rows with one query each, or prompts.
 *
 * Decoding is bound by reading weights, and in Python by the calls around the arithmetic. So one call runs the whole
 * step, or any part of it: every thread walks through the same phases and takes its share of each, with a barrier between
 * phases that read what others wrote. Residual stream and sums are fp32 throughout; weights are fp32, bf16, int8 or int4,
 * the KV cache is fp32 or bf16.
 *
 * Every sum has one order that depends neither on the number of rows nor of threads: a row gives the same bits alone
 * and in a batch, a prompt the same in one piece and in many. Plain C with GCC's and clang's vector extension; libtorch
 * is not involved.
 */
#define _GNU_SOURCE
#include "attention.h"
#include "feed_forward.h"
#include "screen.h"

typedef struct {
    const Model *model;
    Step *step;
    Buffers buffers;
} Call;

/* Embeddings and angles of the rows. */
static void start_rows(const Model *m, const Step *s, const Buffers *b, Seat *seat) {
    int64_t from, to, size = m->layers->rotary_dim / 2;
    int format = (int)m->embedding.format;
    share(seat, s->rows, 1, &from, &to);
    for (int64_t t = from; t < to; t++) {
        float *angles = b->angles + t * 2 * size, position = (float)(s->lengths[t] - 1);
        for (int64_t i = 0; i < size; i++) {
            angles[i] = cosf(position * m->frequencies[i]) * m->rotary_scale;
            angles[size + i] = sinf(position * m->frequencies[i]) * m->rotary_scale;
        }
        for (int64_t i = 0; i < m->hidden && s->parts & EMBED; i++)
            s->x[t * m->hidden + i] = load_weight(rows_at(&m->embedding, s->token_ids[t]), 0, m->hidden, i, format);
    }
    barrier(seat);
}

/* Last norm and logits of the rows that sample. */
static void head(const Model *m, const Step *s, const Buffers *b, Seat *seat) {
    float *normed = b->own + seat->id * b->own_size;
    Room room = room_of(b, seat);
    for (int64_t i = 0; i < s->num_samples; i++)
        rms_norm(s->x + s->samples[i] * m->hidden, m->norm, m->hidden, m->eps, (int)m->half, normed + i * m->hidden);
    if (s->parts & BEST) screened_head(m, s, b, normed, seat);
    else linear(&m->head, normed, s->logits, s->num_samples, 0, m->half, &room, seat);
}

static void run_step(void *argument, Seat *seat) {
    Call *call = argument;
    const Model *m = call->model;
    const Step *s = call->step;
    const Buffers *b = &call->buffers;
    start_rows(m, s, b, seat);
    for (int64_t i = s->first; i < s->last; i++) {
        if (s->parts & ATTEND) attention(&m->layers[i], s, b, seat);
        const Linear *next = i + 1 < m->num_layers ? &m->layers[i + 1].qkv : s->parts & HEAD ? &m->head : NULL;
        if (s->parts & FEED) feed_forward(&m->layers[i], s, b, next, seat);
    }
    if (s->parts & (HEAD | BEST)) head(m, s, b, seat);
}

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Lay the buffers out from `base` on and return their size in floats; with `base` NULL only that. */
static size_t lay_out(const Model *m, const Step *s, int threads, float *base, Buffers *b) {
    int64_t qkv = 0, attended = 0, experts_ = 0, slots = 0, top_k = 0, width = 0, dense_ = 0, keys = 0;
    int64_t deepest = m->hidden;
    for (const Layer *l = m->layers; l < m->layers + m->num_layers; l++) {
        qkv = larger(qkv, l->qkv.n), attended = larger(attended, l->num_heads * l->head_dim);
        experts_ = larger(experts_, l->num_experts), slots = larger(slots, l->num_slots);
        top_k = larger(top_k, l->top_k);
        width = larger(width, l->expert_width), dense_ = larger(dense_, l->dense_width);
        deepest = larger(deepest, larger(l->num_heads * l->head_dim, larger(l->expert_width, l->dense_width)));
    }
    for (int64_t t = 0; t < s->rows; t++) keys = larger(keys, s->lengths[t]);
    size_t used = 0;
#define TAKE(field, type, items) \
    b->field = (type *)(base ? base + used : NULL), used += ((size_t)(items) * sizeof(type) / sizeof *base + 31) / 16 * 16
    TAKE(angles, float, s->rows * m->layers->rotary_dim);
    TAKE(qkv, float, s->rows * qkv);
    TAKE(attended, float, s->rows * attended);
    TAKE(logits, float, s->rows * experts_);
    TAKE(weights, float, s->rows * top_k);
    TAKE(hidden, float, s->rows * top_k * width);
    TAKE(dense_hidden, float, s->rows * 3 * dense_);
    TAKE(gate, float, s->rows);
    TAKE(slots, int64_t, s->rows * top_k);
    int64_t screened = s->parts & BEST ? s->num_samples * threads : 0;
    TAKE(coded, Coded, screened);
    TAKE(codes, uint8_t, screened * m->screen.stride);
    TAKE(least, float, screened);
    TAKE(first, int32_t, slots + 1);
    TAKE(assignment, int32_t, s->rows * top_k);
    b->scores = (larger(larger(s->rows, s->num_samples) * m->hidden, m->layers->head_dim) + 15) / 16 * 16;
    b->score_size = (keys + 47) / 16 * 16;
    b->own_size = b->scores + QUERIES * b->score_size;
    TAKE(own, float, b->own_size * threads);
    b->tile_size = tile_size(deepest, b->columns);
    b->widened_size = 2 * ROWS * stride(deepest);
    TAKE(tiles, uint16_t, b->tile_size * threads);
    TAKE(widened, uint16_t, b->widened_size * threads);
    b->block_size = b->columns ? (block_size(m->layers) + 31) / 32 * 32 : 0;
    TAKE(blocks, uint16_t, b->block_size * threads);
#undef TAKE
    return used;
}

/* Whether bf16 weights are multiplied in units of the processor's own. */
int fm_bf16_units(void) { return BF16_UNITS; }

/* Run one step. Returns 0, or 1 if memory for the buffers is not to be had. */
int fm_step(Pool *pool, const Model *model, Step *step) {
    Call call = {model, step, {.columns = BF16_UNITS && step->prompts && model->half}};
    pthread_mutex_lock(&pool->turn); /* engines of several threads take turns */
    size_t need = lay_out(model, step, pool->threads, NULL, &call.buffers) * sizeof(float);
    if (need > pool->scratch_size) {
        free(pool->scratch);
        pool->scratch_size = 0;
        size_t size = (need + need / 4 + 63) / 64 * 64;
        if ((pool->scratch = aligned_alloc(64, size))) pool->scratch_size = size;
    }
    int failed = pool->scratch == NULL;
    if (!failed) {
        lay_out(model, step, pool->threads, pool->scratch, &call.buffers);
        run(pool, run_step, &call);
    }
    pthread_mutex_unlock(&pool->turn);
    return failed;
}
