/* The head, for rows of which only the largest logit matters, as in greedy decoding.
 *
 * Products of codes of 8 bits, exact in integers, give each logit to within a bound. Whatever may still be the largest is
 * computed from the weights themselves, by the same sums as ever: so the largest logit has the same bits as without, and
 * most of the head is read in half the bytes of bf16. screen.py makes the codes and says why the bound holds.
 */
#ifndef FLEXMOE_SCREEN_H
#define FLEXMOE_SCREEN_H
#include "products.h"

/* Activations that share the loads of ROWS rows of codes; bytes from the rows at hand to those to ask for. */
enum { BATCH = 4, FAR = 8192 };

/* Logits may be off by this besides: above all that products lose which are too small for fp32 or its bf16 units. */
static const float UNDERFLOW_LOSS = 1e-30f;

/* One row's activations as codes + 128, filled up with 128. */
typedef struct Coded {
    const uint8_t *codes;
    float scale, length, lost; /* x is about (code - 128) * scale; the length of x, and of what the codes leave out of it */
} Coded;

/* Codes of the activations x [k]. Adding 1.5 * 2^23 rounds, and leaves the integer in the lowest bits. */
static Coded code(const float *x, int64_t k, int64_t stride, uint8_t *codes) {
    const float shift = 12582912.0f;
    float largest = 0.0f, squares = 0.0f, lost = 0.0f;
    for (int64_t i = 0; i < k; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    float scale = largest / 127.0f, back = largest > 0.0f ? 127.0f / largest : 0.0f;
    for (int64_t i = 0; i < k; i++) {
        float value = x[i] * back, moved = value + shift, rest = value - (moved - shift);
        uint32_t bits;
        memcpy(&bits, &moved, sizeof bits);
        codes[i] = (uint8_t)(bits + 128);
        squares += value * value, lost += rest * rest; /* in units of `scale`, so that none is too small */
    }
    memset(codes + k, 128, stride - k);
    return (Coded){codes, scale, scale * sqrtf(squares), scale * sqrtf(lost)};
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
/* `code_products` of one or two activations, by way of 16 bits, of which two products always fit into 32. */
INLINE void code_block(const int8_t *w, int64_t stride, const Coded *x, int rows, int tokens, int32_t *sums) {
    __m256i sum[2 * ROWS];
    for (int n = 0; n < 2 * ROWS; n++) sum[n] = _mm256_setzero_si256();
    for (int64_t i = 0; i < stride; i += 16) {
        __m256i wide[ROWS];
        for (int r = 0; r < rows; r++)
            wide[r] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + r * stride + i)));
        for (int t = 0; t < tokens; t++) {
            __m256i value = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(x[t].codes + i)));
            for (int r = 0; r < rows; r++)
                sum[t * ROWS + r] = _mm256_add_epi32(sum[t * ROWS + r], _mm256_madd_epi16(value, wide[r]));
        }
    }
    for (int t = 0; t < tokens; t++) {
        const __m256i *s = sum + t * ROWS;
        __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(s[0], s[1]), _mm256_hadd_epi32(s[2], s[3]));
        __m128i totals = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
        memcpy(sums + t * ROWS, &totals, sizeof totals);
    }
}
#endif

/* sums[t * ROWS + r] = codes of row r times those of activation t, of which there are `tokens`. */
INLINE void code_products(const int8_t *w, int64_t stride, const Coded *x, int rows, int tokens, int32_t *sums) {
#ifdef __AVX512VNNI__
    v16i sum[BATCH * ROWS];
    for (int n = 0; n < BATCH * ROWS; n++) sum[n] = (v16i){0};
    for (int64_t i = 0; i < stride; i += LINE) {
        __m512i wide[ROWS];
        for (int r = 0; r < rows; r++) wide[r] = _mm512_loadu_si512(w + r * stride + i);
        for (int t = 0; t < tokens; t++) {
            __m512i value = _mm512_loadu_si512(x[t].codes + i);
            for (int r = 0; r < rows; r++)
                sum[t * ROWS + r] = (v16i)_mm512_dpbusd_epi32((__m512i)sum[t * ROWS + r], value, wide[r]);
        }
    }
    v16i totals = tokens == 1 ? sum_integers4(sum) : sum_integers16(sum);
    memcpy(sums, &totals, tokens * ROWS * sizeof *sums);
#elif defined(__AVX2__)
    int t = 0; /* two activations at once: as many sums as registers */
    for (; t + 2 <= tokens; t += 2) code_block(w, stride, x + t, rows, 2, sums + t * ROWS);
    if (t < tokens) code_block(w, stride, x + t, rows, 1, sums + t * ROWS);
#else
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < stride; i++) sum += x[t].codes[i] * w[r * stride + i];
            sums[t * ROWS + r] = sum;
        }
#endif
}

/* Sums of ROWS rows or fewer with all activations, into the places of their logits [count, V] from row n on. */
INLINE void sum_rows(const int8_t *w, int64_t stride, const Coded *x, int64_t count, int rows, float *logits, int64_t vocab) {
    int32_t sums[BATCH * ROWS];
    for (int64_t t = 0; t < count; t += BATCH) {
        int tokens = count - t < BATCH ? (int)(count - t) : BATCH;
        if (tokens == 1) code_products(w, stride, x + t, rows, 1, sums);
        else if (tokens == 2) code_products(w, stride, x + t, rows, 2, sums);
        else if (tokens == 3) code_products(w, stride, x + t, rows, 3, sums);
        else code_products(w, stride, x + t, rows, 4, sums);
        for (int j = 0; j < tokens; j++) memcpy(logits + (t + j) * vocab, sums + j * ROWS, rows * sizeof *sums);
    }
}

/* About the logits [count, V] of the activations, for rows [from, to) of the head. */
static void screen_rows(const Screen *s, const Coded *x, int64_t count, float *logits, int64_t vocab, int64_t from,
                        int64_t to) {
    int64_t n = from, ahead = ROWS * s->stride;
    for (; n + ROWS <= to; n += ROWS) {
        const int8_t *w = s->codes + n * s->stride;
        for (int64_t i = 0; i < ahead; i += LINE) prefetch(w + ahead + FAR + i);
        sum_rows(w, s->stride, x, count, ROWS, logits + n, vocab);
    }
    for (; n < to; n++) sum_rows(s->codes + n * s->stride, s->stride, x, count, 1, logits + n, vocab);
    for (int64_t t = 0; t < count; t++, logits += vocab)
        for (n = from; n < to; n++) {
            int32_t sum;
            memcpy(&sum, logits + n, sizeof sum);
            logits[n] = (float)(sum - s->shifts[n]) * (s->scales[n] * x[t].scale);
        }
}

/* How far LANES logits from row n on may be from what the codes say, or one. */
INLINE v16 bounds16(const Screen *s, const Coded *x, int64_t n) {
    return load16(s->slack, n, 0) * x->length + load16(s->lengths, n, 0) * x->lost;
}

INLINE float bound(const Screen *s, const Coded *x, int64_t n) { return s->slack[n] * x->length + s->lengths[n] * x->lost; }

/* What the largest logit is at least, by rows [from, to). NaN is passed over. */
static float least_of(const Screen *s, const Coded *x, const float *logits, int64_t from, int64_t to) {
    v16 lanes = (v16){0} - INFINITY;
    int64_t n = from;
    for (; n + LANES <= to; n += LANES) lanes = larger16(load16(logits, n, 0) - bounds16(s, x, n), lanes);
    float best = lanes[0];
    for (int i = 1; i < LANES; i++) best = lanes[i] > best ? lanes[i] : best;
    for (; n < to; n++) best = logits[n] - bound(s, x, n) > best ? logits[n] - bound(s, x, n) : best;
    return best;
}

/* Whether LANES logits from row n on are all certainly below `least`. */
INLINE int all_below(const Screen *s, const Coded *x, const float *logits, int64_t n, float least) {
    v16i below = load16(logits, n, 0) + bounds16(s, x, n) < least;
    int32_t all = -1;
    for (int i = 0; i < LANES; i++) all &= below[i];
    return all;
}

/* The logits of the activation x with rows [from, to) of the head, ROWS at a time; -inf where none can be the largest. */
static void settle(const Model *m, const Coded *code, const float *x, float *logits, int64_t from, int64_t to, float least,
                   const Room *room) {
    const Screen *s = &m->screen;
    for (int64_t n = from, next; n < to; n = next) {
        next = n + ROWS < to ? n + ROWS : to;
        int below = 1;
        for (int64_t i = n; i < next; i++) below &= logits[i] + bound(s, code, i) < least;
        if (!below) linear_rows(&m->head, x, logits, 1, 0, 0, n, next, room); /* and for any NaN */
        else for (int64_t i = n; i < next; i++) logits[i] = -INFINITY;
    }
}

/* Logits of the activations `normed` [N, H]: the largest of each, and -inf for any that is certainly below it. */
static void screened_head(const Model *m, const Step *step, const Buffers *b, const float *normed, Seat *seat) {
    const Screen *s = &m->screen;
    int64_t from, to, vocab = m->head.n, count = step->num_samples, threads = seat->pool->threads;
    Coded *x = b->coded + seat->id * count;
    Room room = room_of(b, seat);
    share(seat, vocab, LANES, &from, &to);
    for (int64_t t = 0; t < count; t++)
        x[t] = code(normed + t * m->hidden, m->hidden, s->stride, b->codes + (seat->id * count + t) * s->stride);
    screen_rows(s, x, count, step->logits, vocab, from, to);
    for (int64_t t = 0; t < count; t++)
        b->least[t * threads + seat->id] = least_of(s, x + t, step->logits + t * vocab, from, to);
    barrier(seat);
    for (int64_t t = 0; t < count; t++) {
        float *logits = step->logits + t * vocab, *least = b->least + t * threads, most = least[0];
        for (int64_t i = 1; i < threads; i++) most = least[i] > most ? least[i] : most;
        most -= UNDERFLOW_LOSS;
        for (int64_t n = from, next; n < to; n = next) {
            next = n + LANES < to ? n + LANES : to;
            if (next == n + LANES && all_below(s, x + t, logits, n, most))
                for (int64_t i = n; i < next; i++) logits[i] = -INFINITY;
            else settle(m, x + t, normed + t * m->hidden, logits, n, next, most, &room);
        }
    }
}
#endif
