/* Sums of products on vectors of 16 floats, from weights in fp32, bf16, int8 or int4. */
#ifndef FLEXMOE_VECTOR_H
#define FLEXMOE_VECTOR_H
#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <math.h>
#include <string.h>

#include "model.h"
#include "threads.h"

#define LANES 16
#define ROWS 4   /* weight rows that share the loads of one activation */
#define TOKENS 8 /* activations that share the loads of weight rows, at most */
/* WIDTH: floats in a register. PAIRS: weight rows x activations in one block, as many sums as fit into registers. */
#if defined(__AVX512F__)
#define WIDTH 16
#define PAIRS 16
#elif defined(__AVX2__)
#define WIDTH 8
#define PAIRS 4
#else
#define WIDTH 4
#define PAIRS 4
#endif
#define PARTS (LANES / WIDTH)

typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32)));

/* Inner loops keep 16 lanes in registers of the processor's own width: compilers put wider vectors into memory. */
typedef float reg __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t regu __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t regh __attribute__((vector_size(2 * WIDTH)));

/* WIDTH numbers of 16 bits as the high halves of 32. Told what to use: by itself GCC converts half a register at a time,
 * and reads memory twice. */
INLINE regu widen_halves(const uint16_t *from) {
#if WIDTH == 16
    return (regu)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#elif WIDTH == 8
    return (regu)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
#else
    regh h;
    memcpy(&h, from, sizeof h);
    return __builtin_convertvector(h, regu) << 16;
#endif
}

INLINE reg load_reg(const void *p, int64_t i, int half) {
    reg f;
    if (half) {
        regu wide = widen_halves((const uint16_t *)p + i);
        memcpy(&f, &wide, sizeof f);
    } else {
        memcpy(&f, (const float *)p + i, sizeof f);
    }
    return f;
}

INLINE v16 load16(const void *p, int64_t i, int half) {
    v16 f;
    if (half) {
        v16h h;
        memcpy(&h, (const uint16_t *)p + i, sizeof h);
        v16u wide = __builtin_convertvector(h, v16u) << 16;
        memcpy(&f, &wide, sizeof f);
    } else {
        memcpy(&f, (const float *)p + i, sizeof f);
    }
    return f;
}

INLINE float load1(const void *p, int64_t i, int half) {
    if (!half) return ((const float *)p)[i];
    uint32_t wide = (uint32_t)((const uint16_t *)p)[i] << 16;
    float f;
    memcpy(&f, &wide, sizeof f);
    return f;
}

/* Round to nearest, ties to even, as torch does; NaN stays NaN. */
INLINE void store1(void *p, int64_t i, float value, int half) {
    if (!half) {
        ((float *)p)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    int nan = (bits & 0x7fffffff) > 0x7f800000;
    ((uint16_t *)p)[i] = nan ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Lanes i + 8, then i + 4, i + 2, i + 1: every sum over lanes in this file adds in this order, alone or beside others. */
#define HALVES_LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HALVES_HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define FOURS_LOW 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define FOURS_HIGH 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define TWOS_LOW 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29
#define TWOS_HIGH 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31
#define ONES_LOW 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ONES_HIGH 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t v16i __attribute__((vector_size(64)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (v16i){__VA_ARGS__})
#endif
#define FOLD_HALVES(a, b) (SHUFFLE(a, b, HALVES_LOW) + SHUFFLE(a, b, HALVES_HIGH))
#define FOLD_FOURS(a, b) (SHUFFLE(a, b, FOURS_LOW) + SHUFFLE(a, b, FOURS_HIGH))
#define FOLD_TWOS(a, b) (SHUFFLE(a, b, TWOS_LOW) + SHUFFLE(a, b, TWOS_HIGH))
#define FOLD_ONES(a, b) (SHUFFLE(a, b, ONES_LOW) + SHUFFLE(a, b, ONES_HIGH))

/* The sums over the lanes of v[0..3], in the first four lanes. */
INLINE v16 sum_lanes4(const v16 *v) {
    v16 all = FOLD_FOURS(FOLD_HALVES(v[0], v[1]), FOLD_HALVES(v[2], v[3]));
    v16 twos = FOLD_TWOS(all, all);
    return FOLD_ONES(twos, twos);
}

/* The sums over the lanes of v[0..15], one a lane. */
INLINE v16 sum_lanes16(const v16 *v) {
    v16 fours[4];
    for (int i = 0; i < 4; i++)
        fours[i] = FOLD_FOURS(FOLD_HALVES(v[4 * i], v[4 * i + 1]), FOLD_HALVES(v[4 * i + 2], v[4 * i + 3]));
    return FOLD_ONES(FOLD_TWOS(fours[0], fours[1]), FOLD_TWOS(fours[2], fours[3]));
}

INLINE float sum16(v16 v) {
    v16 four[4] = {v, v, v, v};
    return sum_lanes4(four)[0];
}

/* Weight rows from some row on. */
typedef struct {
    const char *values;
    const uint16_t *scales;
} Rows;

enum { GROUP = 32 }; /* weights of a row that share a scale */

INLINE int64_t groups(int64_t k) { return (k + GROUP - 1) / GROUP; }

INLINE int64_t row_bytes(int64_t k, int format) {
    return format == F32 ? 4 * k : format == BF16 ? 2 * k : format == INT8 ? k : groups(k) * (GROUP / 2);
}

INLINE Rows skip(Rows w, int64_t rows, int64_t k, int format) {
    w.values += rows * row_bytes(k, format);
    if (format >= INT8) w.scales += rows * groups(k);
    return w;
}

INLINE Rows rows_at(const Linear *l, int64_t n) {
    return skip((Rows){l->weight, l->scales}, n, l->k, (int)l->format);
}

typedef int32_t regi __attribute__((vector_size(4 * WIDTH)));
typedef int16_t regs __attribute__((vector_size(2 * WIDTH)));
typedef int8_t regc __attribute__((vector_size(WIDTH)));

/* WIDTH signed bytes. Told what to use, or going by way of 16 bits: by itself GCC goes number by number. */
INLINE regi widen(const char *from) {
#if WIDTH == 16
    return (regi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif WIDTH == 8
    return (regi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    regc codes;
    memcpy(&codes, from, sizeof codes);
    return __builtin_convertvector(__builtin_convertvector(codes, regs), regi);
#endif
}

/* WIDTH weights of row r from i + at on. Of integers i is a group's start and `scale` what theirs counts. Of INT4, 16
 * bytes hold a group's first half in their low bits and its second half in their high ones. */
INLINE reg load_weights(Rows w, int64_t r, int64_t k, int64_t i, int at, int format, float scale) {
    if (format <= BF16) return load_reg(w.values, r * k + i + at, format);
    const char *from = w.values + r * row_bytes(k, format);
    regi wide;
    if (format == INT8) {
        wide = widen(from + i + at);
    } else {
        wide = widen(from + i / 2 + at % (GROUP / 2));
        wide = (at < GROUP / 2 ? wide & 15 : (wide >> 4) & 15) - 8;
    }
    return __builtin_convertvector(wide, reg) * scale;
}

INLINE float load_weight(Rows w, int64_t r, int64_t k, int64_t i, int format) {
    if (format <= BF16) return load1(w.values, r * k + i, format);
    const int8_t *from = (const int8_t *)w.values + r * row_bytes(k, format);
    int code = format == INT8 ? from[i] : from[i / GROUP * (GROUP / 2) + i % (GROUP / 2)];
    if (format == INT4) code = (i % GROUP < GROUP / 2 ? code & 15 : (code >> 4) & 15) - 8;
    return (float)code * load1(w.scales, r * groups(k) + i / GROUP, 1);
}

/* Add the products of `count` weights from i on, LANES or GROUP of them, to the sums. */
INLINE void add_products(Rows w, int64_t k, const float *const *x, int64_t i, int count, int rows, int tokens,
                         int format, reg (*sums)[PARTS]) {
    float scales[ROWS];
    /* Short rows of several at a time are too little for the processor to guess what comes next: rows after the next. */
    for (int r = 0; r < rows; r++)
        __builtin_prefetch(w.values + (r + 2 * ROWS) * row_bytes(k, format) + row_bytes(i, format));
    for (int r = 0; r < rows; r++)
        scales[r] = format >= INT8 ? load1(w.scales, r * groups(k) + i / GROUP, 1) : 1.0f;
    for (int at = 0; at < count; at += WIDTH) {
        reg wide[ROWS];
        for (int r = 0; r < rows; r++) wide[r] = load_weights(w, r, k, i, at, format, scales[r]);
        for (int t = 0; t < tokens; t++) {
            reg value = load_reg(x[t], i + at, 0);
            for (int r = 0; r < rows; r++) sums[t * rows + r][at / WIDTH % PARTS] += wide[r] * value;
        }
    }
}

/* out[t * ROWS + r] = dot(row r of w, x[t]) for `rows` x `tokens` pairs, at most PAIRS. One chain of sums a pair: its
 * result does not depend on what else is computed beside it. */
INLINE void dot_block(Rows w, int64_t k, const float *const *x, int rows, int tokens, int format, float *out) {
    reg sums[PAIRS][PARTS];
    for (int i = 0; i < PAIRS * PARTS; i++) sums[i / PARTS][i % PARTS] = (reg){0};
    int64_t i = 0;
    /* One activation: a row after the other, as they lie in memory. Several: rows share what is loaded of these. */
    int apart = tokens == 1 ? rows : 1, beside = tokens == 1 ? 1 : rows;
    for (int r = 0; r < apart; r++) {
        Rows own = skip(w, r, k, format);
        for (i = 0; format >= INT8 && i + GROUP <= k; i += GROUP)
            add_products(own, k, x, i, GROUP, beside, tokens, format, sums + r);
        for (; i + LANES <= k; i += LANES) add_products(own, k, x, i, LANES, beside, tokens, format, sums + r);
    }
    v16 sum[PAIRS], totals;
    memcpy(sum, sums, sizeof sum);
    if (rows * tokens <= 4) {
        totals = sum_lanes4(sum);
    } else {
#if PAIRS > 4
        totals = sum_lanes16(sum);
#endif
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) out[t * ROWS + r] = totals[t * rows + r];
    if (__builtin_expect(i < k, 0))
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < rows; r++)
                for (int64_t j = i; j < k; j++) out[t * ROWS + r] += load_weight(w, r, k, j, format) * x[t][j];
}

/* How many of the `left` activations to take next. With many registers, where weights must be widened, eight with two
 * rows at a time widen fewer a product than four with four rows, even if one of the eight is there for nothing. */
INLINE int take_tokens(int64_t left, int64_t format) {
    int most = PAIRS == 4 ? 2 : format != F32 && left >= TOKENS - 1 ? TOKENS : 4;
    return left < most ? (int)left : most;
}

/* The same with `rows` and `tokens` as constants, so that the sums stay in registers. x has room for TOKENS. */
INLINE void dots_of(Rows w, int64_t k, const float **x, int rows, int tokens, int format, float *out) {
    if (rows < ROWS)
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++)
                dot_block(skip(w, r, k, format), k, x + t, 1, 1, format, out + t * ROWS + r);
    else if (tokens == 1) dot_block(w, k, x, ROWS, 1, format, out);
#if PAIRS == 4
    else {
        dot_block(w, k, x, 2, 2, format, out);
        dot_block(skip(w, 2, k, format), k, x, 2, 2, format, out + 2);
    }
#else
    else if (tokens == 2) dot_block(w, k, x, ROWS, 2, format, out);
    else if (tokens == 3) dot_block(w, k, x, ROWS, 3, format, out);
    else if (tokens == 4) dot_block(w, k, x, ROWS, 4, format, out);
    else {
        for (int t = tokens; t < TOKENS; t++) x[t] = x[tokens - 1];
        dot_block(w, k, x, 2, TOKENS, format, out);
        dot_block(skip(w, 2, k, format), k, x, 2, TOKENS, format, out + 2);
    }
#endif
}

#define DOTS(name, format) \
    static __attribute__((noinline)) void name(Rows w, int64_t k, const float **x, int rows, int tokens, float *out) { \
        dots_of(w, k, x, rows, tokens, format, out); \
    }
DOTS(dots_f32, F32)
DOTS(dots_bf16, BF16)
DOTS(dots_int8, INT8)
DOTS(dots_int4, INT4)
#undef DOTS

INLINE void dots(Rows w, int64_t k, const float **x, int rows, int tokens, int64_t format, float *out) {
    if (format == F32) dots_f32(w, k, x, rows, tokens, out);
    else if (format == BF16) dots_bf16(w, k, x, rows, tokens, out);
    else if (format == INT8) dots_int8(w, k, x, rows, tokens, out);
    else dots_int4(w, k, x, rows, tokens, out);
}

/* For weight rows [from, to): y[t][n] = dot + bias, or y[t][n] += dot + bias. x, y: [T, k], [T, n]. half: of the bias. */
static void linear_rows(const Linear *l, const float *x, float *y, int64_t rows, int add, int half, int64_t from,
                        int64_t to) {
    float out[ROWS * TOKENS];
    const float *block[TOKENS];
    for (int64_t n = from; n < to; n += ROWS) {
        int count = to - n < ROWS ? (int)(to - n) : ROWS;
        for (int64_t t = 0, tokens; t < rows; t += tokens) {
            tokens = take_tokens(rows - t, l->format);
            for (int i = 0; i < tokens; i++) block[i] = x + (t + i) * l->k;
            dots(rows_at(l, n), l->k, block, count, (int)tokens, l->format, out);
            for (int i = 0; i < tokens; i++)
                for (int r = 0; r < count; r++) {
                    float value = out[i * ROWS + r] + (l->bias ? load1(l->bias, n + r, half) : 0.0f);
                    float *target = y + (t + i) * l->n + n + r;
                    *target = add ? *target + value : value;
                }
        }
    }
}

static void linear(const Linear *l, const float *x, float *y, int64_t rows, int add, int64_t half, Seat *seat) {
    int64_t from, to;
    share(seat, l->n, ROWS, &from, &to);
    linear_rows(l, x, y, rows, add, (int)half, from, to);
}

static void rms_norm(const float *x, const void *weight, int64_t size, float eps, int half, float *y) {
    v16 squares = {0};
    float tail = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        v16 value = load16(x, i, 0);
        squares += value * value;
    }
    for (; i < size; i++) tail += x[i] * x[i];
    float scale = 1.0f / sqrtf((sum16(squares) + tail) / (float)size + eps);
    for (i = 0; i < size; i++) y[i] = x[i] * scale * load1(weight, i, half);
}

static void norm_rows(const Layer *l, const Step *s, const void *weight, float *out) {
    for (int64_t t = 0; t < s->rows; t++)
        rms_norm(s->x + t * l->hidden, weight, l->hidden, l->eps, (int)l->half, out + t * l->hidden);
}

INLINE v16 larger16(v16 a, v16 b) {
    v16u above = (v16u)(a > b), x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    x = (x & above) | (y & ~above);
    memcpy(&a, &x, sizeof a);
    return a;
}

/* exp of each lane for x <= 0, within 3 units in the last place; 0 from -87 down. The range is reduced to
 * |r| <= ln(2) / 2, where the series of degree 6 leaves out r^7 / 5040, at most 1.2e-7. */
INLINE v16 exp16(v16 x) {
    v16 power = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's last bits are the rounded integer */
    v16 n = power - 12582912.0f;
    v16 r = x - n * 0.693145752f - n * 1.42860677e-6f;
    v16 y = ((((((1.0f / 720 * r) + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6) * r + 0.5f) * r + 1.0f) * r + 1.0f;
    v16u bits;
    memcpy(&bits, &power, sizeof bits);
    v16u scale = (bits << 23) + 0x3f800000u, result;
    v16 factor;
    memcpy(&factor, &scale, sizeof factor);
    y *= factor;
    memcpy(&result, &y, sizeof result);
    result &= (v16u)(x > -87.0f);
    memcpy(&y, &result, sizeof y);
    return y;
}

INLINE float silu(float x) { return x / (1.0f + expf(-x)); }
#endif
