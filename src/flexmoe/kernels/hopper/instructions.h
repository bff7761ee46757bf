// Hopper's instructions by name: barriers in shared memory, copies to it, products of matrices in it. instructions.py
// puts this before a kernel.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short element;  // bf16, or fp16 if HALF

struct alignas(64) TensorMap { u64 opaque[16]; };  // where the copy engine finds boxes of a tensor

__device__ __forceinline__ u32 address_of(const void *shared) { return (u32)__cvta_generic_to_shared(shared); }

__device__ __forceinline__ void barrier_init(u64 *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(arrivals));
}
__device__ __forceinline__ void barrier_arrive(u64 *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_expect(u64 *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
                 : "memory");
}
// Arrives when the copies that this thread has begun have come.
__device__ __forceinline__ void barrier_arrive_after_copies(u64 *barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address_of(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(u64 *barrier, u32 parity) {
    u32 done = 0;
    while (!done)
        asm volatile(
            "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done) : "r"(address_of(barrier)), "r"(parity) : "memory");
}
__device__ __forceinline__ void group_barrier(int group) {  // of one warpgroup's threads
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// 16 bytes to shared memory; zeros if not `valid`.
__device__ __forceinline__ void copy_chunk(u32 to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

// A box of a matrix, by the copy engine, which tells the barrier of its bytes.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap *map, u64 *barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        ::"r"(to), "l"(map), "r"(address_of(barrier)), "r"(column), "r"(row) : "memory");
}

// What wgmma is told of a matrix in shared memory: rows of 128 bytes, swizzled, eight of them 1,024 bytes from the next.
__device__ __forceinline__ u64 matrix(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// What a wait has made valid: no arithmetic on it may be moved before the wait.
template <int N> __device__ __forceinline__ void products_done(float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

__device__ __forceinline__ u32 pair_of(float low, float high) {  // as two elements
    u32 pair;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
    return pair;
}
__device__ __forceinline__ float exp2_of(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
// Four 8 x 8 matrices to shared memory, transposed; lane i of eight says where row i of its matrix goes.
__device__ __forceinline__ void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Four 8 x 8 matrices from shared memory; lane i of eight says where row i of its matrix is.
__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// Products of 64 rows of one matrix and N of another, 16 columns deep: `first` begins sums, `add` adds to them.
// instructions.py writes one for each N.
template <int N> struct Product;      // both matrices in shared memory
template <int N> struct Held;         // the first in registers
template <int N> struct Weighted;     // the first in registers; the second with its N columns together
