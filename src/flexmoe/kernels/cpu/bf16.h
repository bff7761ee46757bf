/* Products of bf16 weights with activations in the processor's bf16 units, where the level has them.
 *
 * Such a unit takes activations in bf16. Two of them, an activation rounded and what the rounding left, keep 16 bits of
 * it: to 4e-6, as good as fp32 beside weights of 8 bits, for twice the products, which reading the weights still hides.
 */
#ifndef FLEXMOE_BF16_H
#define FLEXMOE_BF16_H
#include "vector.h"

#define ROWS 4 /* weight rows that share the loads of one activation */
enum { TILE = 64, TILE_BYTES = 1 << 18, TERMS = 2, STEP = 32 };

/* Ask for weights to come: of short rows, several at a time, a processor does not guess what comes. Into the second
 * cache: the first is full of the activations and rows at hand. */
INLINE void prefetch(const void *weights) { __builtin_prefetch(weights, 0, 2); }

enum { BEYOND = 2048 };

/* While `rows` rows are read side by side, ask for what lies a block of ROWS rows and BEYOND bytes further, line after
 * line as it lies, which memory gives faster than four rows in turns. row: bytes of one; done: of each, those read
 * before this step; step: those of this one. */
INLINE void ask_ahead(const void *weights, int64_t row, int64_t done, int64_t step, int rows) {
    for (int r = 0; r < rows; r++) prefetch((const char *)weights + ROWS * row + BEYOND + rows * done + r * step);
}

/* From one row of activations to the next: their length, filled with zeros up to a whole step, and a line more, since
 * rows at multiples of 4096 bytes would displace each other from the first cache. */
INLINE int64_t stride(int64_t k) { return (k + STEP - 1) / STEP * STEP + STEP; }

#ifdef __AVX512BF16__
#define BF16_UNITS 1
enum { BF16_TOKENS = 4 };
static const __mmask32 ALL = 0xffffffff;

/* STEP floats rounded to bf16, ties to even. */
INLINE void store_step(uint16_t *to, reg low, reg high) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

INLINE __m512 load_floats(const float *from, int64_t left) {
    if (left >= LANES) return _mm512_loadu_ps(from);
    return _mm512_maskz_loadu_ps((__mmask16)(left > 0 ? (1u << left) - 1 : 0), from);
}

INLINE __m512 wide_half(__m512bh both, int high) {
    __m256i half = _mm512_extracti64x4_epi64((__m512i)both, 1);
    if (!high) half = _mm512_castsi512_si256((__m512i)both);
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

/* x [k] as parts [TERMS, stride(k)] that add up to it. */
INLINE void split(const float *x, int64_t k, uint16_t *parts) {
    for (int64_t i = 0; i < k; i += STEP) {
        __m512 low = load_floats(x + i, k - i), high = load_floats(x + i + LANES, k - i - LANES);
        __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
        _mm512_storeu_si512(parts + i, (__m512i)rounded);
        low -= wide_half(rounded, 0), high -= wide_half(rounded, 1);
        _mm512_storeu_si512(parts + stride(k) + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

/* Add the products of STEP weights from i on, those of `mask`, to the sums. ahead: whether to ask for weights to come. */
INLINE void bf16_step(const uint16_t *w, int64_t k, const uint16_t *x, int64_t i, int rows, int tokens, int ahead,
                      __mmask32 mask, __m512 *sums) {
    __m512bh wide[ROWS];
    if (ahead) ask_ahead(w, 2 * k, 2 * i, 2 * STEP, rows);
    for (int r = 0; r < rows; r++) {
        const uint16_t *from = w + r * k + i;
        wide[r] = (__m512bh)(mask == ALL ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(mask, from));
    }
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < TERMS; p++) {
            __m512bh part = (__m512bh)_mm512_loadu_si512(x + (t * TERMS + p) * stride(k) + i);
            for (int r = 0; r < rows; r++) sums[t * rows + r] = _mm512_dpbf16_ps(sums[t * rows + r], wide[r], part);
        }
}

/* out[t * ROWS + r] = dot(row r of w, activation t). One chain of sums a pair, as in products.h. */
INLINE void bf16_block(const uint16_t *w, int64_t k, const uint16_t *x, int rows, int tokens, int ahead, float *out) {
    __m512 sums[BF16_TOKENS * ROWS];
    for (int n = 0; n < rows * tokens; n++) sums[n] = _mm512_setzero_ps();
    int64_t last = (k - 1) / STEP * STEP; /* its step is masked even if whole: one way through keeps sums in registers */
    for (int64_t i = 0; i < last; i += STEP) bf16_step(w, k, x, i, rows, tokens, ahead, ALL, sums);
    bf16_step(w, k, x, last, rows, tokens, ahead, ALL >> (STEP - (k - last)), sums);
    v16 sum[BF16_TOKENS * ROWS];
    for (int n = 0; n < BF16_TOKENS * ROWS; n++) sum[n] = n < rows * tokens ? (v16)sums[n] : (v16){0};
    v16 totals = rows * tokens <= 4 ? sum_lanes4(sum) : sum_lanes16(sum);
    memcpy(out, &totals, rows * tokens * sizeof *out); /* one row has one activation, so the order is that of out */
}

/* The same with `rows` and `tokens` as constants, so that the sums stay in registers. */
INLINE void bf16_dots_of(const uint16_t *w, int64_t k, const uint16_t *x, int rows, int tokens, int ahead, float *out) {
    if (rows < ROWS)
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t++)
                bf16_block(w + r * k, k, x + t * TERMS * stride(k), 1, 1, 0, out + t * ROWS + r);
    else if (tokens == 1) bf16_block(w, k, x, ROWS, 1, ahead, out);
    else if (tokens == 2) bf16_block(w, k, x, ROWS, 2, ahead, out);
    else if (tokens == 3) bf16_block(w, k, x, ROWS, 3, ahead, out);
    else bf16_block(w, k, x, ROWS, 4, ahead, out);
}

/* The first activations that meet some weights ask for those to come. */
static __attribute__((noinline)) void bf16_dots(const uint16_t *w, int64_t k, const uint16_t *x, int rows, int tokens,
                                                int ahead, float *out) {
    if (ahead) bf16_dots_of(w, k, x, rows, tokens, 1, out);
    else bf16_dots_of(w, k, x, rows, tokens, 0, out);
}
#else
#define BF16_UNITS 0
INLINE void split(const float *x, int64_t k, uint16_t *parts) { (void)x, (void)k, (void)parts; }
INLINE void bf16_dots(const uint16_t *w, int64_t k, const uint16_t *x, int rows, int tokens, int ahead, float *out) {
    (void)w, (void)k, (void)x, (void)rows, (void)tokens, (void)ahead, (void)out;
}
#endif
#endif
