/* Functions of vector.h and products.h, as functions that Python can call. */
#define _GNU_SOURCE
#include "products.h"

void t_exp(const float *x, float *y, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        v16 out = exp16(load16(x, i, 0));
        memcpy(y + i, &out, sizeof out);
    }
}

void t_narrow(const float *x, uint16_t *y, int64_t size) {
    for (int64_t i = 0; i < size; i++) store1(y, i, x[i], 1);
}

void t_widen(const uint16_t *x, float *y, int64_t size) {
    for (int64_t i = 0; i < size; i++) y[i] = load1(x, i, 1);
}

void t_widen16(const uint16_t *x, float *y, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) {
        v16 out = load16(x, i, 1);
        memcpy(y + i, &out, sizeof out);
    }
}

/* The sum of each of 16 vectors, in three ways. */
void t_sums(const float *x, float *by_16, float *by_4, float *by_1) {
    v16 v[16], out;
    memcpy(v, x, sizeof v);
    out = sum_lanes16(v);
    memcpy(by_16, &out, sizeof out);
    for (int i = 0; i < 16; i += 4) {
        out = sum_lanes4(v + i);
        memcpy(by_4 + i, &out, 4 * sizeof *by_4);
    }
    for (int i = 0; i < 16; i++) by_1[i] = sum16(v[i]);
}

void t_linear(const void *weight, const void *bias, const uint16_t *scales, int64_t n, int64_t k, int64_t format,
              const float *x, float *y, int64_t rows, int add, int half, int64_t from, int64_t to, int columns) {
    Linear l = {weight, bias, scales, n, k, format};
    size_t tile = tile_size(k, columns) * sizeof(uint16_t), widened = 2 * ROWS * k * sizeof(uint16_t);
    Room room = {columns && BF16_UNITS, malloc(tile), malloc(widened)};
    memset(room.tile, 0xff, tile); /* NaN */
    memset(room.widened, 0xff, widened);
    linear_rows(&l, x, y, rows, add, half, from, to, &room);
    free(room.tile);
    free(room.widened);
}

int t_bf16_units(void) { return BF16_UNITS; }

void t_swiglu(const float *gate, const float *up, float *out, int64_t size) {
    for (int64_t i = 0; i < size; i += LANES) swiglu(gate + i, up + i, 1.0f, out + i);
}

void t_rms_norm(const float *x, const void *weight, int64_t size, float eps, int half, float *y) {
    rms_norm(x, weight, size, eps, half, y);
}

void t_share(int threads, int id, int64_t items, int64_t unit, int64_t *from, int64_t *to) {
    Pool pool = {.threads = threads};
    share(&(Seat){&pool, id}, items, unit, from, to);
}
