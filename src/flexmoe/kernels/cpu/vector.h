/* Vectors of 16 floats: loading, rounding, sums over lanes, norms, exp. */
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
/* Floats in a register. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define PARTS (LANES / WIDTH)

typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
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
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (v16i){__VA_ARGS__})
#endif
#define FOLD_HALVES(a, b) (SHUFFLE(a, b, HALVES_LOW) + SHUFFLE(a, b, HALVES_HIGH))
#define FOLD_FOURS(a, b) (SHUFFLE(a, b, FOURS_LOW) + SHUFFLE(a, b, FOURS_HIGH))
#define FOLD_TWOS(a, b) (SHUFFLE(a, b, TWOS_LOW) + SHUFFLE(a, b, TWOS_HIGH))
#define FOLD_ONES(a, b) (SHUFFLE(a, b, ONES_LOW) + SHUFFLE(a, b, ONES_HIGH))

/* The sums over the lanes of v[0..3], in the first four lanes, and of v[0..15], one a lane; of floats, and of integers. */
#define SUM_LANES(type, four, sixteen) \
    INLINE type four(const type *v) { \
        type all = FOLD_FOURS(FOLD_HALVES(v[0], v[1]), FOLD_HALVES(v[2], v[3])); \
        type twos = FOLD_TWOS(all, all); \
        return FOLD_ONES(twos, twos); \
    } \
    INLINE type sixteen(const type *v) { \
        type fours[4]; \
        for (int i = 0; i < 4; i++) \
            fours[i] = FOLD_FOURS(FOLD_HALVES(v[4 * i], v[4 * i + 1]), FOLD_HALVES(v[4 * i + 2], v[4 * i + 3])); \
        return FOLD_ONES(FOLD_TWOS(fours[0], fours[1]), FOLD_TWOS(fours[2], fours[3])); \
    }
SUM_LANES(v16, sum_lanes4, sum_lanes16)
SUM_LANES(v16i, sum_integers4, sum_integers16)

INLINE float sum16(v16 v) {
    v16 four[4] = {v, v, v, v};
    return sum_lanes4(four)[0];
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

/* a where the mask is set, else b. */
INLINE v16 select16(v16u mask, v16 a, v16 b) {
    v16u x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    x = (x & mask) | (y & ~mask);
    memcpy(&a, &x, sizeof a);
    return a;
}

INLINE v16 larger16(v16 a, v16 b) { return select16((v16u)(a > b), a, b); }

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

/* out = silu(gate) * up * scale of LANES numbers. Never inlined: every number is computed in one way, wherever it
 * stands. */
static __attribute__((noinline)) void swiglu(const float *gate, const float *up, float scale, float *out) {
    v16 x = load16(gate, 0, 0), one = (v16){0} + 1.0f;
    v16 e = exp16(-larger16(x, -x)); /* of -|x|, which never overflows */
    v16 y = x * select16((v16u)(x < 0.0f), e, one) / (one + e) * load16(up, 0, 0) * scale;
    memcpy(out, &y, sizeof y);
}
#endif
