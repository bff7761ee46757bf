/* Products of bf16 weights with many activations, rounded to bf16 and laid in columns: each lane holds another activation.
 *
 * Two numbers of a weight row meet 16 activations in one operation, and a lane ends as a whole sum: nothing is added over
 * lanes, which costs a dot along the row up to half as much as its products. For prompts alone, since with few activations
 * most lanes are empty; each sum goes through its row in the same way, however many are beside it.
 */
#ifndef FLEXMOE_COLUMNS_H
#define FLEXMOE_COLUMNS_H
#include "bf16.h"

/* Activations of a tile: as many sums as fit into registers beside ROWS; bytes of a tile, half the second cache; those of
 * half a register, which the last few take. */
enum { COLUMNS = 96, COLUMN_BYTES = 1 << 19, FEW = LANES / 2 };

/* Numbers of one group of LANES activations, [k / 2, LANES, 2] with k rounded up. */
INLINE int64_t group_size(int64_t k) { return (k + STEP - 1) / STEP * STEP * LANES; }

/* Activations that a tile of length k holds. */
INLINE int64_t column_rows(int64_t k) {
    int64_t rows = COLUMN_BYTES / (2 * group_size(k)) * LANES;
    return rows < LANES ? LANES : rows < COLUMNS ? rows : COLUMNS;
}

#if BF16_UNITS
/* From LANES activations, of each LANES pairs of numbers, to the first pairs of all of them, then the second ones. */
INLINE void to_pairs(const __m512i *rows, uint16_t *pairs) {
    for (int t = 0; t < LANES; t += 4) {
        __m512i low = _mm512_unpacklo_epi32(rows[t], rows[t + 1]), high = _mm512_unpackhi_epi32(rows[t], rows[t + 1]);
        __m512i low2 = _mm512_unpacklo_epi32(rows[t + 2], rows[t + 3]);
        __m512i high2 = _mm512_unpackhi_epi32(rows[t + 2], rows[t + 3]);
        __m512i four[4] = {_mm512_unpacklo_epi64(low, low2), _mm512_unpackhi_epi64(low, low2),
                           _mm512_unpacklo_epi64(high, high2), _mm512_unpackhi_epi64(high, high2)};
        for (int p = 0; p < 4; p++) { /* holds pairs p, p + 4, p + 8, p + 12 of four activations */
            __m128i *to = (__m128i *)(pairs + 2 * (p * LANES + t));
            _mm_storeu_si128(to, _mm512_castsi512_si128(four[p]));
            _mm_storeu_si128(to + LANES, _mm512_extracti32x4_epi32(four[p], 1));
            _mm_storeu_si128(to + 2 * LANES, _mm512_extracti32x4_epi32(four[p], 2));
            _mm_storeu_si128(to + 3 * LANES, _mm512_extracti32x4_epi32(four[p], 3));
        }
    }
}

/* Activations x[count] of k numbers to groups. Lanes without one repeat the last. */
static void to_columns(const float *const *x, int64_t count, int64_t k, uint16_t *columns) {
    for (int64_t first = 0; first < count; first += LANES, columns += group_size(k))
        for (int64_t i = 0; i < k; i += STEP) {
            __m512i rows[LANES];
            for (int t = 0; t < LANES; t++) {
                const float *from = x[first + t < count ? first + t : count - 1] + i;
                __m512 low = load_floats(from, k - i), high = load_floats(from + LANES, k - i - LANES);
                rows[t] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            }
            to_pairs(rows, columns + i * LANES);
        }
}

/* Sums of `groups` groups and, in `few`, of half a group more, with each of ROWS weight rows. */
typedef struct {
    __m512 groups[COLUMNS / LANES * ROWS];
    __m256 few[ROWS];
} Sums;

INLINE void clear(Sums *sums, int rows, int groups, int few) {
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < rows; r++) sums->groups[g * ROWS + r] = _mm512_setzero_ps();
    for (int r = 0; r < rows && few; r++) sums->few[r] = _mm256_setzero_ps();
}

/* Add the products of a pair of each weight row, or of one number where `bytes` are those of one. */
INLINE void add_pair(const uint16_t *w, int64_t k, const uint16_t *x, int rows, int groups, int few, int64_t bytes,
                     Sums *sums) {
    __m512bh activations[COLUMNS / LANES];
    __m256bh last = {0};
    for (int g = 0; g < groups; g++) activations[g] = (__m512bh)_mm512_loadu_si512(x + g * group_size(k));
    if (few) last = (__m256bh)_mm256_loadu_si256((const __m256i *)(x + groups * group_size(k)));
    for (int r = 0; r < rows; r++) {
        int pair = 0;
        memcpy(&pair, w + r * k, bytes);
        __m512i weights = _mm512_set1_epi32(pair);
        for (int g = 0; g < groups; g++)
            sums->groups[g * ROWS + r] = _mm512_dpbf16_ps(sums->groups[g * ROWS + r], activations[g], (__m512bh)weights);
        if (few) sums->few[r] = _mm256_dpbf16_ps(sums->few[r], last, (__m256bh)_mm512_castsi512_si256(weights));
    }
}

/* The same for STEP numbers from i on. */
INLINE void add_step(const uint16_t *w, int64_t k, const uint16_t *x, int64_t i, int rows, int groups, int few,
                     Sums *sums) {
    ask_ahead(w, 2 * k, 2 * i, 2 * STEP, rows);
    for (int64_t j = i; j < i + STEP; j += 2) add_pair(w + j, k, x + j * LANES, rows, groups, few, 4, sums);
}

/* out[t * ROWS + r] of one group from sums[r]. */
INLINE void store_group(const __m512 *sums, int rows, float *out) {
    if (rows < ROWS) {
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < LANES; t++) out[t * ROWS + r] = sums[r][t];
        return;
    }
    __m512d low = (__m512d)_mm512_unpacklo_ps(sums[0], sums[1]), high = (__m512d)_mm512_unpackhi_ps(sums[0], sums[1]);
    __m512d low2 = (__m512d)_mm512_unpacklo_ps(sums[2], sums[3]), high2 = (__m512d)_mm512_unpackhi_ps(sums[2], sums[3]);
    __m512d tokens[4] = {_mm512_unpacklo_pd(low, low2), _mm512_unpackhi_pd(low, low2), _mm512_unpacklo_pd(high, high2),
                         _mm512_unpackhi_pd(high, high2)};
    for (int t = 0; t < 4; t++) { /* of activations t, t + 4, t + 8, t + 12 */
        _mm_storeu_ps(out + ROWS * t, _mm512_castps512_ps128((__m512)tokens[t]));
        _mm_storeu_ps(out + ROWS * (t + 4), _mm512_extractf32x4_ps((__m512)tokens[t], 1));
        _mm_storeu_ps(out + ROWS * (t + 8), _mm512_extractf32x4_ps((__m512)tokens[t], 2));
        _mm_storeu_ps(out + ROWS * (t + 12), _mm512_extractf32x4_ps((__m512)tokens[t], 3));
    }
}

/* Each sum is one over the first half of its row plus one over the second. Where few activations leave registers free,
 * both are made at the same time, since a sum cannot take its next product before it has the last one. */
INLINE void column_block(const uint16_t *w, int64_t k, const uint16_t *x, int rows, int groups, int few, float *out) {
    Sums first, second;
    int64_t half = k / (2 * STEP) * STEP, i = half;
    int both = groups <= 2;
    clear(&first, rows, groups, few);
    if (both) clear(&second, rows, groups, few);
    for (int64_t j = 0; j < half; j += STEP) {
        add_step(w, k, x, j, rows, groups, few, &first);
        if (both) add_step(w, k, x, half + j, rows, groups, few, &second);
    }
    if (both) i += half;
    else clear(&second, rows, groups, few);
    for (; i + STEP <= k; i += STEP) add_step(w, k, x, i, rows, groups, few, &second);
    for (; i + 2 <= k; i += 2) add_pair(w + i, k, x + i * LANES, rows, groups, few, 4, &second);
    if (i < k) add_pair(w + i, k, x + i * LANES, rows, groups, few, 2, &second);
    for (int g = 0; g < groups; g++) {
        for (int r = 0; r < rows; r++) first.groups[g * ROWS + r] += second.groups[g * ROWS + r];
        store_group(first.groups + g * ROWS, rows, out + g * LANES * ROWS);
    }
    if (!few) return;
    __m512 wide[ROWS];
    for (int r = 0; r < rows; r++) wide[r] = _mm512_castps256_ps512(first.few[r] + second.few[r]);
    store_group(wide, rows, out + groups * LANES * ROWS);
}

/* out[t * ROWS + r] = dot(row r of w, activation t), for `tokens` activations; writes whole groups. */
static __attribute__((noinline)) void column_dots(const uint16_t *w, int64_t k, const uint16_t *x, int rows, int tokens,
                                                  float *out) {
    if (rows < ROWS) {
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < tokens; t += LANES)
                column_block(w + r * k, k, x + t / LANES * group_size(k), 1, 1, 0, out + t * ROWS + r);
        return;
    }
    switch ((tokens + FEW - 1) / FEW) {
#define CASE(halves) case halves: column_block(w, k, x, ROWS, halves / 2, halves % 2, out); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}
#else
INLINE void to_columns(const float *const *x, int64_t count, int64_t k, uint16_t *columns) {
    (void)x, (void)count, (void)k, (void)columns;
}
INLINE void column_dots(const uint16_t *w, int64_t k, const uint16_t *x, int rows, int tokens, float *out) {
    (void)w, (void)k, (void)x, (void)rows, (void)tokens, (void)out;
}
#endif
#endif
