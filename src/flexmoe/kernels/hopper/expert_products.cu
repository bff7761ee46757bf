// Rows of many experts meet their experts' weights, on the tensor cores of Hopper: each half of a MoE layer's experts,
// where an expert has dozens of rows and more. products.py compiles it, and says what enters and leaves.
//
// One block of threads a processor, of three warpgroups. The first one loads: TILE_M rows of weights and up to MAX_N
// rows of tokens, 64 columns of both at a time, into a ring of STAGES stages in shared memory. The two others multiply,
// each its half of the weights' rows by all of the tokens. Weights are on the left, so that a tile has as many columns
// as there are tokens, and next to none for nothing. While a tile's results are written, the next one's first stages
// are on their way. The larger a tile, the less it asks of L2 and of shared memory, and the fewer stages fit. The last
// tiles, if they are too few for all processors, are halved. Macros: TILE_M, MAX_N, STAGES, STAGING (bytes for results of
// each multiplying warpgroup), FINE_FROM (of fewer tokens sizes of products are 32 apart), MAX_SLOTS; see products.py.
//
// GATE_UP 1: the weights' rows come eight of gate, the same eight of up, and so on, so that a thread has both of a pair;
// leaves silu(gate) * up. 0: leaves rows of y, scaled by the router's weights.
// GATHER 1: tokens are rows of x [T, depth], gathered by threads. 0: rows in the order of slots, as hidden's are, which
// the copy engine brings.

constexpr int GROUPS = 2, WARPGROUP = 128;
constexpr int TILE_K = 64;             // 128 bytes: a row of the swizzled layout that wgmma reads
constexpr int M_TILES = TILE_M / 64 / GROUPS;  // products of 64 rows that a multiplying warpgroup has
// A warpgroup has two products in hand: of two times 64 rows of weights, each of which reads the tokens out of shared
// memory; or of the same 64, which it holds in registers, and two halves of the tokens: then it reads both but once.
constexpr bool HOLDS = M_TILES == 1;
constexpr int PARTS = HOLDS ? 2 : 1;   // of a tile's tokens
[[maybe_unused]] constexpr int MANY = 128, FEW = 32;  // rows of tokens in a box; MAX_N is a multiple of FEW
constexpr int NEXT = 8;                // more than stages: threads that load may be so many tiles apart
constexpr int WEIGHT_BYTES = TILE_M * TILE_K * 2, STAGE_BYTES = WEIGHT_BYTES + MAX_N * TILE_K * 2;
constexpr int CHUNKS = (GATE_UP ? 4 : 8) * M_TILES;  // of 16 bytes that a warpgroup leaves for each token
constexpr int PASS = STAGING / (16 * CHUNKS);        // tokens whose results fit its staging at once
// Registers of a thread that loads, and of one that multiplies; together what three warpgroups have at the start. Who
// gathers rows is slower with fewer, wide products need more.
constexpr int LOADING_REGISTERS = GATHER ? 56 : 40, MULTIPLYING_REGISTERS = GATHER ? 224 : 232;

struct Arguments {
    const int *rows;         // [S, capacity]: a slot's assignments
    const int *counts;       // [S]: how many they are
    const float *scales;     // of each assignment; only for y
    const element *x;        // [T, depth]; only for GATHER
    element *out;            // [T * K, width]
    int *progress;           // [2], zeros: the next tile, and how many blocks are done
    int capacity, slots, top_k, depth, width;
};

// A block of a slot's tokens, by a block of rows of its weights. slot: -1 after the last tile. first, count: of the slot's
// rows; offset: rows before the first in the order of slots. padded: columns of the products, which see to all of them.
struct Tile { int slot, first, count, padded, column, offset; };

struct Shared {
    u64 full[STAGES], empty[STAGES];
    Tile tile_of[STAGES];    // whose loads begin with this stage
    u64 next_full[NEXT];     // tells that `next` is there
    int next[NEXT];          // tiles to come
    int ends[MAX_SLOTS];     // blocks of tokens of the slots up to this one
    int offsets[MAX_SLOTS];  // rows of the slots before this one
#if !GATE_UP
    int row[GROUPS][MAX_N];  // of each multiplying warpgroup: its tokens' assignments and their scales
    float scale[GROUPS][MAX_N];
#endif
};
static_assert(CHUNKS % 8 == 0, "staging would not be apart by banks");
static_assert(GATHER || MAX_N % FEW == 0, "boxes of tokens would reach beyond a stage");
static_assert(STAGES * STAGE_BYTES + GROUPS * STAGING + sizeof(Shared) <= SHARED_BYTES, "more than a block may have");

__device__ __forceinline__ void load_weights(u32 to, const TensorMap *map, u64 *barrier, int k, int slot, int column) {
#if GATE_UP
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %6, %6, %4, %5}], [%2];"
        ::"r"(to), "l"(map), "r"(address_of(barrier)), "r"(k), "r"(column * (TILE_M / 16)), "r"(slot), "r"(0) : "memory");
#else
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
        ::"r"(to), "l"(map), "r"(address_of(barrier)), "r"(k), "r"(column * TILE_M), "r"(slot) : "memory");
#endif
}
// Begins the products of a stage, once it is there; of weights that are held, ends them, too.
template <int N, bool FIRST> __device__ __forceinline__ void multiply_stage(
    Shared &shared, float (&sums)[M_TILES * PARTS][N / PARTS / 2], u32 ring, int group, int thread, int stage, u32 parity
) {
    barrier_wait(&shared.full[stage], parity);
#if GATHER
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // what threads copied, for the tensor cores
#endif
    u32 place = ring + stage * STAGE_BYTES, own = place + group * (WEIGHT_BYTES / GROUPS);
    u64 tokens = matrix(place + WEIGHT_BYTES);
    if constexpr (HOLDS) {
        u32 held[TILE_K / 16][4], row = thread / 32 * 16 + thread % 16;
#pragma unroll
        for (int k = 0; k < TILE_K / 16; k++)
            load_matrices(held[k], own + row * 128 + ((k * 2 + thread % 32 / 16) ^ (row % 8)) * 16);
        products_begin();
#pragma unroll
        for (int k = 0; k < TILE_K / 16; k++)  // 32 bytes each, in units of 16
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                u64 right = tokens + part * (N / PARTS * 8) + k * 2;
                if (FIRST && k == 0) Held<N / PARTS>::first(sums[part], held[k], right);
                else Held<N / PARTS>::add(sums[part], held[k], right);
            }
        products_commit();
        products_wait<0>();  // the next stage's weights take the same registers; the other warpgroup goes on meanwhile
        if (thread % 32 == 0) barrier_arrive(&shared.empty[stage]);
    } else {
        u64 weights = matrix(own);
        products_begin();
#pragma unroll
        for (int k = 0; k < TILE_K / 16; k++)
#pragma unroll
            for (int m = 0; m < M_TILES; m++)
                if (FIRST && k == 0) Product<N>::first(sums[m], weights + m * 512 + k * 2, tokens + k * 2);
                else Product<N>::add(sums[m], weights + m * 512 + k * 2, tokens + k * 2);
        products_commit();
    }
}

// Of eight tokens and 64 rows of weights, the m-th ones that a warpgroup has, what a thread has.
template <int N> __device__ __forceinline__ const float *sums_of(
    const float (&sums)[M_TILES * PARTS][N / PARTS / 2], int m, int token
) {
    constexpr int PART = N / PARTS;
    return &sums[m + token / PART][token % PART / 8 * 4];
}

__device__ __forceinline__ float silu_times(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}
// Where a chunk of a token's results is in its warpgroup's staging: so that neither side meets a bank twice.
__device__ __forceinline__ u32 staged(int token, int chunk) {
    return (token * CHUNKS + (chunk ^ (token & 7))) * 16;
}

// Blocks of tokens, slot after slot, and the rows before each slot; by one warp.
__device__ __forceinline__ void count_blocks(Shared &shared, const Arguments &args, int lane) {
    int blocks = 0, rows = 0;
    for (int base = 0; base < args.slots; base += 32) {
        int slot = base + lane, count = slot < args.slots ? args.counts[slot] : 0;
        int end = (count + MAX_N - 1) / MAX_N, before = count;
        for (int step = 1; step < 32; step *= 2) {
            int more = __shfl_up_sync(~0u, end, step), earlier = __shfl_up_sync(~0u, before, step);
            if (lane >= step) end += more, before += earlier;
        }
        if (slot < args.slots) {
            shared.ends[slot] = blocks + end;
            shared.offsets[slot] = rows + before - count;
        }
        blocks += __shfl_sync(~0u, end, 31), rows += __shfl_sync(~0u, before, 31);
    }
}

// How many of the last tiles are halved, by their tokens: those that are left when each block of threads has had as many
// as the others, if there is a block for each half.
__device__ __forceinline__ int halved_of(int tiles) {
    int left = tiles % (int)gridDim.x;
    return left <= (int)gridDim.x / 2 ? left : 0;
}

// Slot after slot, and of a slot column after column, which all its blocks of tokens meet one behind the other: so they
// ask L2 for the same weights at about the same time, and for the same tokens soon again. A slot's blocks hold about as
// many tokens each. Tiles that are halved have two indices each; of a few tokens the second half has none.
__device__ __forceinline__ Tile tile_at(const Shared &shared, const Arguments &args, int index, int columns) {
    int blocks = shared.ends[args.slots - 1], whole = blocks * columns - halved_of(blocks * columns);
    bool halved = index >= whole;
    int half = (index - whole) % 2;
    if (halved) index = whole + (index - whole) / 2;
    int low = 0, high = args.slots - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if (shared.ends[middle] * columns > index) high = middle; else low = middle + 1;
    }
    Tile tile;
    int first_block = low ? shared.ends[low - 1] : 0, own = shared.ends[low] - first_block;
    int rows = args.counts[low];
    int each = (rows + own * 8 - 1) / (own * 8) * 8;
    index -= first_block * columns;
    tile.slot = low;
    tile.column = index / own;
    tile.first = index % own * each;
    tile.count = min(each, rows - tile.first);
    if (halved) {
        int before_half = (tile.count + 15) / 16 * 8;
        tile.count = half ? max(0, tile.count - before_half) : min(before_half, tile.count);
        tile.first += half * before_half;
    }
    int step = tile.count > FINE_FROM ? 8 * PARTS : 32;  // fewer are bound by their weights, whatever the rest costs
    tile.padded = max(step, (tile.count + step - 1) / step * step);
    tile.offset = shared.offsets[low] + tile.first;
    return tile;
}

__device__ __forceinline__ void load_tiles(
    Shared &shared, const Arguments &args, const TensorMap *weights_map, const TensorMap *many_tokens,
    const TensorMap *few_tokens, u32 ring, int thread, int tiles, int columns
) {
    int stage = 0, steps = (args.depth + TILE_K - 1) / TILE_K, fetched = blockIdx.x;
    u32 parity = 1;
    for (int turn = 0;; turn++) {
#if GATHER
        if (thread == 0) {
            shared.next[turn % NEXT] = fetched;
            barrier_arrive(&shared.next_full[turn % NEXT]);
        }
        barrier_wait(&shared.next_full[turn % NEXT], turn / NEXT % 2);
        int index = shared.next[turn % NEXT];
#else
        if (thread != 0) return;
        int index = fetched;
#endif
        Tile tile;
        tile.slot = -1;
        if (index < tiles) tile = tile_at(shared, args, index, columns);
        barrier_wait(&shared.empty[stage], parity);
        if (thread == 0) shared.tile_of[stage] = tile;
        if (tile.slot < 0) break;
        if (thread == 0) fetched = gridDim.x + atomicAdd(args.progress, 1);
#if !GATHER
        // In few copies, if that brings up to a quarter of a large one too much: the copy engine is slow with small ones.
        int loaded = (tile.count + FEW - 1) / FEW * FEW, rest = loaded % MANY;
        if (rest >= MANY - FEW && loaded - rest + MANY <= MAX_N) loaded += MANY - rest;
#else
        const int *rows = args.rows + (long long)tile.slot * args.capacity + tile.first;
        u32 at[MAX_N / 16];  // elements of x before this thread's part of its tokens' rows
#pragma unroll
        for (int i = 0; i < MAX_N / 16; i++) {
            int token = thread / 8 + 16 * i;
            at[i] = token < tile.count ? (u32)(rows[token] / args.top_k) * (u32)args.depth : ~0u;
        }
        u32 chunk = thread % 8, to = ring + WEIGHT_BYTES + thread / 8 * 128 + ((chunk ^ (thread / 8 % 8)) * 16);
#endif
        for (int step = 0; step < steps; step++) {
            u64 *full = &shared.full[stage];
            u32 place = ring + stage * STAGE_BYTES;
            barrier_wait(&shared.empty[stage], parity);
            if (thread == 0) {
#if GATHER
                barrier_expect(full, WEIGHT_BYTES);
#else
                barrier_expect(full, WEIGHT_BYTES + loaded * TILE_K * 2);
#endif
                load_weights(place, weights_map, full, step * TILE_K, tile.slot, tile.column);
            }
#if GATHER
            u32 column = step * TILE_K + chunk * 8;
#pragma unroll
            for (int i = 0; i < MAX_N / 16; i++)
                if (i * 16 < tile.padded) {
                    bool valid = at[i] != ~0u && column < (u32)args.depth;
                    copy_chunk(to + stage * STAGE_BYTES + i * 2048, args.x + (valid ? at[i] + column : 0), valid);
                }
            barrier_arrive_after_copies(full);
#else
            for (int token = 0; token < loaded;) {
                bool many = token + MANY <= loaded;
                copy_box(
                    place + WEIGHT_BYTES + token * 128, many ? many_tokens : few_tokens, full, step * TILE_K,
                    tile.offset + token
                );
                token += many ? MANY : FEW;
            }
#endif
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
    // The end is a stage without loads.
#if GATHER
    barrier_arrive(&shared.full[stage]);
#endif
    if (thread == 0) barrier_arrive(&shared.full[stage]);
}

template <int N> __device__ __forceinline__ void compute_tile(
    Shared &shared, const Arguments &args, const Tile &tile, u32 ring, u32 staging, int group, int thread, int steps,
    int &stage, u32 &parity
) {
    float sums[M_TILES * PARTS][N / PARTS / 2];
    int warp = thread / 32, lane = thread % 32;
#if !GATE_UP
    const int *rows = args.rows + (long long)tile.slot * args.capacity + tile.first;
    constexpr int EACH = (MAX_N + WARPGROUP - 1) / WARPGROUP;  // tokens whose assignments a thread looks up
    int mine[EACH];
    float scales[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int token = thread + i * WARPGROUP;
        mine[i] = token < tile.count ? rows[token] : -1;
    }
#endif
    multiply_stage<N, true>(shared, sums, ring, group, thread, stage, parity);
#if !GATE_UP
#pragma unroll
    for (int i = 0; i < EACH; i++) scales[i] = mine[i] < 0 ? 0.0f : args.scales[mine[i]];
#endif
    for (int step = 1; step < steps; step++) {
        int previous = stage;
        if (++stage == STAGES) stage = 0, parity ^= 1;
        multiply_stage<N, false>(shared, sums, ring, group, thread, stage, parity);
        if constexpr (HOLDS) continue;
        products_wait<1>();
        if (lane == 0) barrier_arrive(&shared.empty[previous]);
    }
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < M_TILES * PARTS; i++) products_done(sums[i]);
    if (!HOLDS && lane == 0) barrier_arrive(&shared.empty[stage]);
    if (++stage == STAGES) stage = 0, parity ^= 1;

#if !GATE_UP
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int token = thread + i * WARPGROUP;
        if (token < MAX_N) shared.row[group][token] = mine[i], shared.scale[group][token] = scales[i];
    }
    group_barrier(group);
#endif
    constexpr int UNIT = GATE_UP ? 32 : 16;  // tokens of four matrices
#pragma unroll
    for (int begin = 0; begin < N; begin += PASS) {
        if (begin) group_barrier(group);
#pragma unroll
        for (int n = begin; n < begin + PASS && n < N; n += UNIT)
#pragma unroll
            for (int m = 0; m < M_TILES; m++) {
                u32 parts[4];
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    if (n + (GATE_UP ? part : part / 2) * 8 >= N) {
                        parts[part] = 0;
                        continue;
                    }
#if GATE_UP  // four times eight tokens; sums: gate of two tokens, then up
                    const float *s = sums_of<N>(sums, m, n + part * 8);
                    parts[part] = pair_of(silu_times(s[0], s[2]), silu_times(s[1], s[3]));
#else        // twice eight tokens, of each two times eight rows of weights
                    int token = n + part / 2 * 8;
                    const float *s = sums_of<N>(sums, m, token) + part % 2 * 2;
                    const float *scale = &shared.scale[group][token + lane % 4 * 2];
                    parts[part] = pair_of(s[0] * scale[0], s[1] * scale[1]);
#endif
                }
                int which = lane / 8;
                int token = n - begin + (GATE_UP ? which : which / 2) * 8 + lane % 8;
                int chunk = GATE_UP ? m * 4 + warp : m * 8 + warp * 2 + which % 2;
                store_transposed(staging + staged(token, chunk), parts[0], parts[1], parts[2], parts[3]);
            }
        group_barrier(group);
#pragma unroll 4
        for (int i = thread; i < PASS * CHUNKS && i < (N - begin) * CHUNKS; i += WARPGROUP) {
            int token = i / CHUNKS, chunk = i % CHUNKS;
            int column = (tile.column * GROUPS + group) * CHUNKS * 8 + chunk * 8;
            if (begin + token < tile.count && column < args.width) {
                uint4 chunk_of;
                asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(chunk_of.x), "=r"(chunk_of.y), "=r"(chunk_of.z), "=r"(chunk_of.w)
                             : "r"(staging + staged(token, chunk)));
#if GATE_UP
                long long row = tile.offset + begin + token;
#else
                long long row = shared.row[group][begin + token];
#endif
                *reinterpret_cast<uint4 *>(args.out + row * args.width + column) = chunk_of;
            }
        }
    }
    group_barrier(group);  // the staging is free again
}

__device__ __forceinline__ void compute_tiles(
    Shared &shared, const Arguments &args, u32 ring, u32 staging, int group, int thread
) {
    int stage = 0, steps = (args.depth + TILE_K - 1) / TILE_K;
    u32 parity = 0;
    while (true) {
        barrier_wait(&shared.full[stage], parity);
        Tile tile = shared.tile_of[stage];
        if (tile.slot < 0) return;
        switch (tile.padded) {
//CASES//
        }
    }
}

extern "C" __global__ void __launch_bounds__((1 + GROUPS) * WARPGROUP, 1) NAME(
    const __grid_constant__ TensorMap weights_map, const __grid_constant__ TensorMap many_tokens,
    const __grid_constant__ TensorMap few_tokens, const __grid_constant__ Arguments args
) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 ring = address_of(memory);
    Shared &shared = *reinterpret_cast<Shared *>(memory + STAGES * STAGE_BYTES + GROUPS * STAGING);
    int group = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(&shared.full[stage], GATHER ? WARPGROUP + 1 : 1);
            barrier_init(&shared.empty[stage], 4 * GROUPS);  // a lane of each multiplying warp
        }
        for (int at = 0; at < NEXT; at++) barrier_init(&shared.next_full[at], 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        if (ring % 1024) __trap();  // the swizzle counts from multiples of 1,024
    }
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (threadIdx.x < 32) count_blocks(shared, args, threadIdx.x);
    __syncthreads();
    int columns = (args.width + TILE_M / (GATE_UP ? 2 : 1) - 1) / (TILE_M / (GATE_UP ? 2 : 1));
    int tiles = shared.ends[args.slots - 1] * columns;
    tiles += halved_of(tiles);
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADING_REGISTERS));
        load_tiles(shared, args, &weights_map, &many_tokens, &few_tokens, ring, thread, tiles, columns);
        if (thread == 0 && atomicAdd(args.progress + 1, 1) == (int)gridDim.x - 1)  // the last one leaves zeros
            args.progress[0] = args.progress[1] = 0;
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING_REGISTERS));
        u32 staging = ring + STAGES * STAGE_BYTES + (group - 1) * STAGING;
        compute_tiles(shared, args, ring, staging, group - 1, thread);
    }
}
