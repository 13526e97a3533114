/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * The NAS Parallel Benchmarks, serial, written from their definitions in
 * RNR-94-007 and NAS-95-020. One file a kernel; npb.c has the table.
 */
#ifndef NPB_H
#define NPB_H

#include "runtime.h"

struct npb_run {
	uint64_t cycles; /* of the timed section */
	double value, reference, error;
	bool verified;
};

struct npb_kernel {
	const char *name;
	/* Allocates and does what the definition leaves untimed. False where
	   the kernel has no such class. Called once. */
	bool (*prepare)(char problem_class);
	/* The timed section, from the same start every time. */
	void (*run)(struct npb_run *run);
};

extern const struct npb_kernel npb_cg, npb_ep, npb_ft, npb_is, npb_mg;

/* Prints the line that says how far a run is. */
void npb_progress(unsigned iteration, unsigned iterations);

/* How long the guest was kept from running: the longest time in cycles between
   two looks at the TSC. Kernels look about every 0.1 ms of a timed section. */
struct npb_watch {
	uint64_t last_look, max_gap;
};
extern struct npb_watch npb_watch;

static inline void npb_look(void)
{
	uint64_t now = rdtsc();

	if (now - npb_watch.last_look > npb_watch.max_gap)
		npb_watch.max_gap = now - npb_watch.last_look;
	npb_watch.last_look = now;
}

/* The generator that all kernels share: x = a x mod 2^46, as x / 2^46. */
#define NPB_SEED 314159265ul
#define NPB_MULTIPLIER 1220703125ul /* 5^13 */
#define NPB_MODULUS_MASK ((1ul << 46) - 1)
double randlc(uint64_t *x, uint64_t a);

/* Square root by the SSE instruction; there is no libm. */
static inline double square_root(double value)
{
	double root;

	__asm__("sqrtsd %1, %0" : "=x"(root) : "xm"(value));
	return root;
}

#endif
