/* A pool of threads that walk through one function together, with barriers. */
#ifndef FLEXMOE_THREADS_H
#define FLEXMOE_THREADS_H
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define INLINE static inline __attribute__((always_inline))

/* Spinning covers the gap between a step and the next, since waking a thread takes a tenth of a small model's step.
 * Whoever waits longer sleeps, so an idle engine is idle. */
enum { BARRIER_SPINS = 400, GAP_NANOSECONDS = 1000000, SPINS_A_LOOK = 64 };

typedef struct Pool Pool;
typedef struct {
    Pool *pool;
    int id;
} Seat;

struct Pool {
    int threads;
    Seat *seats;
    void (*work)(void *, Seat *);
    void *argument;
    atomic_uint generation, arrived, phase;
    pthread_mutex_t lock, turn;
    pthread_cond_t wake;
    float *scratch;
    size_t scratch_size;
};

INLINE void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static void barrier(Seat *seat) {
    Pool *pool = seat->pool;
    if (pool->threads == 1) return;
    unsigned phase = atomic_load_explicit(&pool->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&pool->arrived, 1, memory_order_acq_rel) + 1 == (unsigned)pool->threads) {
        atomic_store_explicit(&pool->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->phase, phase + 1, memory_order_release);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&pool->phase, memory_order_acquire) == phase; spins++) {
        if (spins < BARRIER_SPINS) pause_cpu();
        else sched_yield(); /* another program has the core that one of us needs */
    }
}

INLINE int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* Wait for a new generation of work, for as long as the gap between two steps. */
static void wait_awake(Pool *pool, unsigned seen) {
    for (int64_t end = nanoseconds() + GAP_NANOSECONDS; nanoseconds() < end;)
        for (int spins = 0; spins < SPINS_A_LOOK; spins++) {
            if (atomic_load_explicit(&pool->generation, memory_order_acquire) != seen) return;
            pause_cpu();
        }
}

static void *worker(void *argument) {
    Seat *seat = argument;
    Pool *pool = seat->pool;
    for (unsigned seen = 0;; seen++) {
        wait_awake(pool, seen);
        if (atomic_load(&pool->generation) == seen) {
            pthread_mutex_lock(&pool->lock);
            while (atomic_load(&pool->generation) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
            pthread_mutex_unlock(&pool->lock);
        }
        pool->work(pool->argument, seat);
        barrier(seat);
    }
    return NULL;
}

/* A pool of `threads` threads, the caller's included. It lives as long as the process. NULL: no threads to be had. */
Pool *fm_pool(int threads) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool || !(pool->seats = calloc(threads, sizeof *pool->seats))) return NULL;
    pool->threads = threads;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_mutex_init(&pool->turn, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (int i = 0; i < threads; i++) pool->seats[i] = (Seat){pool, i};
    for (int i = 1; i < threads; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, &pool->seats[i])) return NULL;
        pthread_detach(thread);
    }
    return pool;
}

static void run(Pool *pool, void (*work)(void *, Seat *), void *argument) {
    pool->work = work;
    pool->argument = argument;
    if (pool->threads > 1) {
        pthread_mutex_lock(&pool->lock);
        atomic_fetch_add(&pool->generation, 1);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
    work(argument, &pool->seats[0]);
    barrier(&pool->seats[0]);
}

/* This thread's share of `items`, in units of `unit`. */
INLINE void share(Seat *seat, int64_t items, int64_t unit, int64_t *from, int64_t *to) {
    int64_t units = (items + unit - 1) / unit, n = seat->pool->threads;
    *from = units * seat->id / n * unit;
    *to = units * (seat->id + 1) / n * unit;
    if (*to > items) *to = items;
}
#endif
