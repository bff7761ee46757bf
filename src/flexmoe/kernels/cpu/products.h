/* Products of weight rows, in fp32, bf16, int8 or int4, with activations: the kernels of every projection and expert.
 *
 * A row of weights is read where it lies, along its length, so nothing is packed and one weight serves torch as well.
 * Activations go in tiles that stay in the cache while the weights stream by once a tile.
 */
#ifndef FLEXMOE_PRODUCTS_H
#define FLEXMOE_PRODUCTS_H
#include "columns.h"
#include "vector.h"

#define TOKENS 8 /* activations that share the loads of weight rows, at most */
/* Weight rows x activations in one block, as many sums as fit into registers. */
#if WIDTH == 16
#define PAIRS 16
#else
#define PAIRS 4
#endif

/* Weight rows from some row on. */
typedef struct {
    const char *values;
    const uint16_t *scales;
} Rows;

enum { GROUP = 32, LINE = 64 }; /* weights of a row that share a scale; bytes of a cache line */

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

/* Ask for the first rows of a thread's share of some weights, before it waits for the others: they travel meanwhile. */
INLINE void ask_rows(const Linear *l, int64_t from, int64_t to) {
    const char *first = rows_at(l, from).values;
    int64_t bytes = (to - from < 2 * ROWS ? to - from : 2 * ROWS) * row_bytes(l->k, (int)l->format);
    for (int64_t i = 0; i < bytes; i += LINE) prefetch(first + i);
}

INLINE void ask(const Linear *l, Seat *seat) {
    int64_t from, to;
    if (!l || !l->weight) return;
    share(seat, l->n, ROWS, &from, &to);
    ask_rows(l, from, to);
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
    ask_ahead(w.values, row_bytes(k, format), row_bytes(i, format), row_bytes(count, format), rows);
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
    int64_t i = 0;
    for (int n = 0; n < rows * tokens * PARTS; n++) sums[n / PARTS][n % PARTS] = (reg){0};
    for (; format >= INT8 && i + GROUP <= k; i += GROUP) add_products(w, k, x, i, GROUP, rows, tokens, format, sums);
    for (; i + LANES <= k; i += LANES) add_products(w, k, x, i, LANES, rows, tokens, format, sums);
    v16 sum[PAIRS], totals;
    for (int n = 0; n < PAIRS; n++) {
        if (n < rows * tokens) memcpy(sum + n, sums[n], sizeof *sum);
        else sum[n] = (v16){0};
    }
    if (rows * tokens <= 4) {
        totals = sum_lanes4(sum);
    } else {
#if PAIRS > 4
        totals = sum_lanes16(sum);
#endif
    }
    if (rows == ROWS) memcpy(out, &totals, rows * tokens * sizeof *out);
    for (int t = 0; t < tokens && rows < ROWS; t++)
        for (int r = 0; r < rows; r++) out[t * ROWS + r] = totals[t * rows + r];
    if (__builtin_expect(i < k, 0))
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < rows; r++)
                for (int64_t j = i; j < k; j++) out[t * ROWS + r] += load_weight(w, r, k, j, format) * x[t][j];
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

/* One thread's memory for products, and whether activations for bf16 units are rounded and laid in columns: else they
 * are in TERMS parts. */
typedef struct {
    int columns;
    uint16_t *tile;    /* [TILE, TERMS, k] activations, or [COLUMNS / LANES, k / 2, LANES, 2] */
    uint16_t *widened; /* [2 * ROWS, k] weights */
} Room;

INLINE Room room_of(const Buffers *b, const Seat *seat) {
    return (Room){b->columns, b->tiles + seat->id * b->tile_size, b->widened + seat->id * b->widened_size};
}

/* Activations that the weights meet together, where they lie; what bf16 units take of them lies in the room. */
typedef struct {
    const float *x[COLUMNS + TOKENS];
    int64_t count;
    int columns; /* whether they are laid in columns */
} Tile;

/* Rows of a tile; its activations fill a part of the second cache that leaves room for weights. */
INLINE int64_t tile_rows(int64_t k) {
    int64_t rows = TILE_BYTES / (2 * TERMS * stride(k)) / TOKENS * TOKENS;
    return rows < TOKENS ? TOKENS : rows < TILE ? rows : TILE;
}

/* Numbers in a room's tile. Not those of a tile of `deepest`: one of shorter activations may hold more. */
INLINE int64_t tile_size(int64_t deepest, int columns) {
    int64_t most = columns ? COLUMN_BYTES / 2 : TILE_BYTES / 2;
    int64_t least = columns ? group_size(deepest) : TOKENS * TERMS * stride(deepest);
    return most > least ? most : least;
}

/* Whether these weights are multiplied as bf16. Integers are not while activations are to be exact: a product for the
 * scale of each group would come on top of two for the parts. */
INLINE int as_bf16(int64_t format, const Room *room) {
    return BF16_UNITS && (format == BF16 || (format >= INT8 && room->columns));
}

/* Begin a tile with as many of the `left` activations as it holds. In columns it holds more, and in tiles of about the
 * same size no tile has just a few. */
INLINE void begin_tile(Tile *tile, int64_t left, int64_t k, int64_t format, const Room *room) {
    tile->columns = room->columns && as_bf16(format, room);
    int64_t most = tile->columns ? column_rows(k) : tile_rows(k), tiles = (left + most - 1) / most;
    if (tile->columns) most = ((left + tiles - 1) / tiles + FEW - 1) / FEW * FEW;
    tile->count = left < most ? left : most;
}

/* How many of the activations from `first` on to take next; in columns all. With many registers, where weights must be
 * widened, eight with two rows at a time widen fewer a product than four with four rows, even if one of the eight is
 * there for nothing. */
INLINE int take_tokens(const Tile *tile, int64_t first, int64_t format) {
    int64_t left = tile->count - first;
    if (tile->columns) return (int)left;
    int wide = format != F32 && !(BF16_UNITS && format == BF16);
    int most = PAIRS == 4 ? 2 : wide && left >= TOKENS - 1 ? TOKENS : 4;
    return left < most ? (int)left : most;
}

/* Make the parts or the columns of the tile's activations, if weights of this format meet these. */
INLINE void prepare(Tile *tile, int64_t k, int64_t format, const Room *room) {
    if (!as_bf16(format, room)) return;
    if (tile->columns) {
        to_columns(tile->x, tile->count, k, room->tile);
        return;
    }
    for (int64_t j = 0; j < tile->count; j++) split(tile->x[j], k, room->tile + j * TERMS * stride(k));
}

/* The same rows in the format that is multiplied; `place`: which half of the room for widened ones to use. */
INLINE Rows ready(Rows w, int64_t k, int rows, int place, int64_t *format, const Room *room) {
    if (*format <= BF16 || !as_bf16(*format, room)) return w;
#if BF16_UNITS
    uint16_t *wide = room->widened + place * ROWS * k;
    for (int r = 0; r < rows; r++) {
        int64_t i = 0;
        for (; i + GROUP <= k; i += GROUP) {
            float scale = load1(w.scales, r * groups(k) + i / GROUP, 1);
            reg low = load_weights(w, r, k, i, 0, (int)*format, scale);
            store_step(wide + r * k + i, low, load_weights(w, r, k, i, LANES, (int)*format, scale));
        }
        for (; i < k; i++) store1(wide, r * k + i, load_weight(w, r, k, i, (int)*format), 1);
    }
    *format = BF16;
    w = (Rows){(const char *)wide, NULL};
#else
    (void)k, (void)rows, (void)place;
#endif
    return w;
}

/* out[t * ROWS + r] for `tokens` activations of the tile from `first` on. */
INLINE void dots(Rows w, int64_t k, Tile *tile, int64_t first, int rows, int tokens, int64_t format, const Room *room,
                 float *out) {
    const float **x = tile->x + first;
    const uint16_t *parts = room->tile + first * TERMS * stride(k), *half = (const uint16_t *)w.values;
    if (tile->columns) column_dots(half, k, room->tile, rows, tokens, out);
    else if (format == F32) dots_f32(w, k, x, rows, tokens, out);
    else if (BF16_UNITS && format == BF16) bf16_dots(half, k, parts, rows, tokens, !first, out);
    else if (format == BF16) dots_bf16(w, k, x, rows, tokens, out);
    else if (format == INT8) dots_int8(w, k, x, rows, tokens, out);
    else dots_int4(w, k, x, rows, tokens, out);
}

/* y = or += value + bias, of `count` columns. */
INLINE void add_or_set(float *y, const float *value, const float *bias, int count, int add) {
    float sum[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = value[r] + bias[r];
    if (count < ROWS) {
        for (int r = 0; r < count; r++) y[r] = add ? y[r] + sum[r] : sum[r];
        return;
    }
    for (int r = 0; add && r < ROWS; r++) sum[r] = y[r] + sum[r];
    memcpy(y, sum, sizeof sum);
}

/* For weight rows [from, to): y[t][n] = dot + bias, or y[t][n] += dot + bias. x, y: [T, k], [T, n]. half: of the bias. */
static void linear_rows(const Linear *l, const float *x, float *y, int64_t rows, int add, int half, int64_t from,
                        int64_t to, const Room *room) {
    float out[ROWS * COLUMNS] = {0};
    Tile tile;
    for (int64_t start = 0; start < rows; start += tile.count) {
        begin_tile(&tile, rows - start, l->k, l->format, room);
        for (int64_t j = 0; j < tile.count; j++) tile.x[j] = x + (start + j) * l->k;
        prepare(&tile, l->k, l->format, room);
        for (int64_t n = from; n < to; n += ROWS) {
            int count = to - n < ROWS ? (int)(to - n) : ROWS;
            int64_t format = l->format;
            Rows w = ready(rows_at(l, n), l->k, count, 0, &format, room);
            float bias[ROWS] = {0};
            for (int r = 0; l->bias && r < count; r++) bias[r] = load1(l->bias, n + r, half);
            for (int64_t t = 0, tokens; t < tile.count; t += tokens) {
                tokens = take_tokens(&tile, t, format);
                dots(w, l->k, &tile, t, count, (int)tokens, format, room, out);
                for (int i = 0; i < tokens; i++)
                    add_or_set(y + (start + t + i) * l->n + n, out + i * ROWS, bias, count, add);
            }
        }
    }
}

static void linear(const Linear *l, const float *x, float *y, int64_t rows, int add, int64_t half, const Room *room,
                   Seat *seat) {
    int64_t from, to;
    share(seat, l->n, ROWS, &from, &to);
    linear_rows(l, x, y, rows, add, (int)half, from, to, room);
}
#endif
