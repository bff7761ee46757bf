/* What the caller describes: a model and one step of it. kernels/cpu/decode.py has the same structures. */
#ifndef FLEXMOE_MODEL_H
#define FLEXMOE_MODEL_H
#include <stdint.h>

/* Number formats of weights. INT8 and INT4 are codes times a bf16 scale for each GROUP of a row; kernels/quantize.py
 * tells how they lie. */
enum { F32, BF16, INT8, INT4 };

/* One projection: weight [n, k] row by row, of a format; bias [n] or NULL; scales [n, k / GROUP, up] or NULL. */
typedef struct {
    const void *weight, *bias;
    const uint16_t *scales;
    int64_t n, k, format;
} Linear;

/* One layer. Pointers are NULL where the model lacks the part. `half`: norms, biases and cache are bf16, else fp32. */
typedef struct {
    int64_t half, hidden, num_heads, num_kv_heads, head_dim, rotary_dim, window, qk_norm;
    int64_t num_experts, num_slots, top_k, expert_width, renormalize, dense_width;
    float eps, clip;
    const void *input_norm, *q_norm, *k_norm, *mlp_norm;
    Linear qkv, out;
    const float *router;         /* [E, H] */
    const int64_t *slot_of;      /* [E] physical slot of each logical expert */
    Linear gate_up, down;        /* of all experts one after the other: [S, 2F, H], [S, H, F] */
    Linear dense_gate_up, dense_down, dense_gate; /* dense layer, or shared expert with its gate [1, H] */
    void *cache;                 /* [slots, 2, Hkv, D] */
} Layer;

/* Which tokens can be the most likely: a head in codes of 8 bits with bounds. screen.h tells how. */
typedef struct {
    const int8_t *codes;  /* [V, stride]: stride is H filled up with zeros to whole cache lines */
    const float *scales;  /* [V] what a code of a row counts */
    const float *slack;   /* [V] the length of what the codes leave out of a row, and rounding */
    const float *lengths; /* [V] of a row of codes */
    const int32_t *shifts; /* [V] 128 times the sum of a row's codes */
    int64_t stride;
} Screen;

/* What stands around the layers. */
typedef struct {
    int64_t half, hidden, num_layers;
    Linear embedding;         /* [V, H] */
    const void *norm;         /* [H] */
    Linear head;              /* [V, H] */
    Screen screen;            /* of the head, or NULL */
    const float *frequencies; /* [R / 2] radians a position */
    float rotary_scale, eps;
    const Layer *layers;
} Model;

/* The rows of one step, each with the keys of its sequence that it sees. In a step of decodes each is the latest token of
 * a sequence of its own. In one of prompts many follow each other in a sequence, and in bf16 models, where bf16 units
 * multiply, activations are rounded to bf16, as torch rounds them. */
typedef struct {
    int64_t rows, block_size, table_width, prompts, num_samples;
    const int64_t *token_ids;      /* [T] */
    const int32_t *tables;         /* [T, table_width] blocks of each row's sequence */
    const int32_t *lengths;        /* [T] keys that each row sees, its own the last */
    const int64_t *samples;        /* [N] rows whose logits are wanted */
    float *x;                      /* [T, H] residual stream */
    float *logits;                 /* [N, V] out */
    int64_t *topk_ids;             /* [T, K] out: logical experts of the last layer run */
    float *topk_weights;           /* [T, K] out */
    int64_t first, last;           /* layers to run */
    int64_t parts;                 /* sum of EMBED, ATTEND, FEED and one of HEAD and BEST */
} Step;

/* BEST: of the logits only the largest, the others at least not larger. */
enum { EMBED = 1, ATTEND = 2, FEED = 4, HEAD = 8, BEST = 16 };

/* Buffers of one call, laid out in the pool's scratch memory. */
typedef struct {
    float *angles, *qkv, *attended, *logits, *weights, *hidden, *dense_hidden, *gate;
    struct Coded *coded;         /* [threads, N] screen.h's, of the rows that sample */
    uint8_t *codes;              /* [threads, N, stride] */
    float *least;                /* [N, threads] */
    int64_t *slots;              /* [T, K] */
    int32_t *first, *assignment; /* [S + 1], [T * K]: assignments sorted by slot, ties by token */
    float *own;                  /* per thread: normed rows [T, H] or a head, then scores of some queries */
    int64_t own_size, scores, score_size; /* floats per thread; where the scores begin in them; those of a query */
    uint16_t *tiles, *widened;   /* per thread: what products.h calls a Room */
    int64_t tile_size, widened_size;
    uint16_t *blocks;            /* per thread: what prompt_attention.h calls a Block */
    int64_t block_size;
    int columns; /* whether bf16 units take activations in columns, see columns.h */
} Buffers;
#endif
