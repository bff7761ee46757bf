/* Where the keys and values of a row's sequence lie in the paged cache. */
#ifndef FLEXMOE_KEYS_H
#define FLEXMOE_KEYS_H
#include "products.h"

/* Keys [from, to) of one sequence, block by block: `slot` is where the run's first key lies in the cache. */
typedef struct {
    int64_t key, stop, slot;
} Run;

INLINE Run next_run(const Step *s, const int32_t *table, int64_t key, int64_t to) {
    int64_t block = key / s->block_size, start = block * s->block_size, stop = start + s->block_size;
    return (Run){key, stop < to ? stop : to, (int64_t)table[block] * s->block_size + key - start};
}

/* The keys [from, to) that row t sees. */
INLINE Run seen(const Layer *l, const Step *s, int64_t t) {
    int64_t to = s->lengths[t];
    return (Run){l->window > 0 && to > l->window ? to - l->window : 0, to, 0};
}

/* How many rows from t on follow each other in one sequence, `most` at most. */
INLINE int64_t following(const Step *s, int64_t t, int64_t most) {
    int64_t n = 1, size = s->table_width * (int64_t)sizeof *s->tables;
    const int32_t *table = s->tables + t * s->table_width;
    for (; n < most && t + n < s->rows; n++)
        if (s->lengths[t + n] != s->lengths[t] + n || memcmp(table + n * s->table_width, table, size)) break;
    return n;
}
#endif
