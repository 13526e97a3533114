/*
 * Pins a process to each CPU. Each computes in all sixteen AVX registers, for a long time without
 * touching memory, and compares the result with the same computation in integer registers. So a
 * vector register that a checkpoint loses, or gives to another CPU, shows within one round.
 *
 *     avxloop SECONDS     prints `avx: cpu N round R` now and then, `avx: cpu N done R` at the end
 *                         and `avx: cpu N WRONG` if a register is
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { REGISTERS = 16, LANES = 4, STEPS = 20000 };

typedef uint64_t lanes[REGISTERS][LANES] __attribute__((aligned(32)));

#define LOAD(n) "vmovdqa " #n "*32(%0), %%ymm" #n "\n\t"
#define STORE(n) "vmovdqa %%ymm" #n ", " #n "*32(%0)\n\t"
#define STEP(n, next) "vpaddq %%ymm" #next ", %%ymm" #n ", %%ymm" #n "\n\t"
#define EACH(of) of(0) of(1) of(2) of(3) of(4) of(5) of(6) of(7) of(8) of(9) of(10) of(11) of(12) of(13) of(14) of(15)

static void in_vectors(lanes state)
{
    long steps = STEPS;
    __asm__ volatile(EACH(LOAD)
                     "1:\n\t"
                     STEP(0, 1) STEP(1, 2) STEP(2, 3) STEP(3, 4) STEP(4, 5) STEP(5, 6) STEP(6, 7)
                     STEP(7, 8) STEP(8, 9) STEP(9, 10) STEP(10, 11) STEP(11, 12) STEP(12, 13)
                     STEP(13, 14) STEP(14, 15) STEP(15, 0)
                     "dec %1\n\t"
                     "jnz 1b\n\t" EACH(STORE) "vzeroupper\n\t"
                     : "+r"(state), "+r"(steps)
                     :
                     : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                       "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}

static void in_integers(lanes state)
{
    for (int lane = 0; lane < LANES; lane++)
        for (int step = 0; step < STEPS; step++)
            for (int n = 0; n < REGISTERS; n++)
                state[n][lane] += state[(n + 1) % REGISTERS][lane];
}

static int worker(int cpu, int seconds)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0) {
        printf("avx: cpu %d cannot be had\n", cpu);
        return 1;
    }
    lanes state, expected;
    for (int n = 0; n < REGISTERS; n++)
        for (int lane = 0; lane < LANES; lane++)
            state[n][lane] = 0x9e3779b97f4a7c15u * (uint64_t)(1 + cpu * 64 + n * LANES + lane);
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (long round = 1;; round++) {
        memcpy(expected, state, sizeof state);
        in_vectors(state);
        in_integers(expected);
        if (memcmp(state, expected, sizeof state) != 0) {
            printf("avx: cpu %d WRONG in round %ld\n", cpu, round);
            return 1;
        }
        if (round % 16 == 0)
            printf("avx: cpu %d round %ld\n", cpu, round);
        /* The checkpoint's threads run only where nobody else wants the CPU. */
        usleep(20000);
        clock_gettime(CLOCK_MONOTONIC, &now);
        long ms = (now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000;
        if (ms >= seconds * 1000L) {
            printf("avx: cpu %d done %ld\n", cpu, round);
            return 0;
        }
    }
}

int main(int argc, char **argv)
{
    int seconds = argc > 1 ? atoi(argv[1]) : 10;
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    if (!__builtin_cpu_supports("avx2")) {
        puts("avx: this CPU has no AVX2");
        return 1;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int cpu = 0; cpu < cpus; cpu++)
        if (fork() == 0)
            _exit(worker(cpu, seconds));
    int failed = 0, status;
    while (wait(&status) > 0)
        failed |= status != 0;
    printf("avx: %s\n", failed ? "FAILED" : "all right");
    return failed;
}
