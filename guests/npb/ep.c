/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * EP: the sums of millions of pairs of Gaussian deviates, and how many of them
 * fall into each square ring around the origin. Random points of a square give
 * them by the polar method, those that are within the unit circle.
 *
 * Only one batch of points and the sums are kept, so this kernel hardly uses
 * memory.
 */
#include "elementary.h"

#define EP_SEED 271828183ul
#define TOLERANCE 1e-8
#define BATCH 4096 /* points: at most 0.1 ms or so */
#define PROGRESS_LINES 16
#define RINGS 16

struct problem {
	char problem_class;
	unsigned log2_points;
	double sum_x, sum_y;
	uint64_t pairs;
};

static const struct problem problems[] = {
	{'S', 24, -3.247834652034740e3, -6.958407078382297e3, 13176389},
	{'W', 25, -2.863319731645753e3, -6.320053679109499e3, 26354769},
	{'A', 28, -4.295875165629892e3, -1.580732573678431e4, 210832767},
	{'B', 30, 4.033815542441498e4, -2.660669192809235e4, 843345606},
	{'C', 32, 4.764367927995374e4, -8.084072988043731e4, 3373275903},
};

struct state {
	/* Of one batch of points: the random numbers that make them, those of
	   the first batch, and what comes of them. */
	uint64_t number_x[BATCH], number_y[BATCH], first_x[BATCH], first_y[BATCH];
	double x[BATCH], y[BATCH], scale_squared[BATCH];
	/* Of all batches. */
	uint64_t ring[RINGS];
	double sum_x, sum_y;
};

static const struct problem *problem;
static struct state *state;
static uint64_t stride; /* NPB_MULTIPLIER^(2 BATCH): from a batch to the next */

/* 2 r - 1 for a random number r, which is given times 2^46: put into the
   fraction of a double, it makes 2 + 2 r. Exact. */
static inline __attribute__((always_inline)) double coordinate(uint64_t number)
{
	return double_of_bits(number << (FRACTION_BITS - 46) | bits_of_double(2)) - 3;
}

/*
 * Makes the points of a batch and the squares of what scales them to deviates,
 * -2 ln t / t, where t is the squared distance from the origin. For a point
 * outside the circle 0 is stored, so that it adds nothing to the sums.
 *
 * t is never 0: random numbers times 2^46 are odd.
 */
static void make_points(void)
{
	for (unsigned i = 0; i < BATCH; i++) {
		double x = coordinate(state->number_x[i]), y = coordinate(state->number_y[i]);
		double t = x * x + y * y;
		double scale_squared = -2 * natural_logarithm(t) / t;

		state->x[i] = x;
		state->y[i] = y;
		state->scale_squared[i] = scale_squared > 0 ? scale_squared : 0;
		state->number_x[i] = state->number_x[i] * stride & NPB_MODULUS_MASK;
		state->number_y[i] = state->number_y[i] * stride & NPB_MODULUS_MASK;
	}
}

static inline double absolute(double value)
{
	return __builtin_fabs(value); /* no branch: half of them would go wrong */
}

static void add_deviates(void)
{
	double sum_x = 0, sum_y = 0;

	for (unsigned i = 0; i < BATCH; i++) {
		bool inside = state->scale_squared[i] != 0;
		double scale = square_root(state->scale_squared[i]);
		double x = scale * state->x[i], y = scale * state->y[i];
		double far_x = absolute(x), far_y = absolute(y);
		double larger = far_x > far_y ? far_x : far_y;

		/* Below 12: t is 2^-89 at least. */
		state->ring[(unsigned)(int)larger % RINGS] += inside;
		sum_x += x;
		sum_y += y;
	}
	state->sum_x += sum_x;
	state->sum_y += sum_y;
}

static void start_over(void)
{
	memcpy(state->number_x, state->first_x, sizeof(state->number_x));
	memcpy(state->number_y, state->first_y, sizeof(state->number_y));
	memset(state->ring, 0, sizeof(state->ring));
	state->sum_x = 0;
	state->sum_y = 0;
}

static void do_batch(void)
{
	make_points();
	add_deviates();
	npb_look();
}

static bool prepare(char problem_class)
{
	uint64_t seed = EP_SEED;

	for (size_t i = 0; i < sizeof(problems) / sizeof(problems[0]); i++) {
		if (problems[i].problem_class == problem_class)
			problem = &problems[i];
	}
	if (problem == NULL)
		return false;
	state = arena_alloc(sizeof(*state), PAGE_BYTES);
	stride = 1;
	for (unsigned i = 0; i < BATCH; i++) {
		randlc(&seed, NPB_MULTIPLIER);
		state->first_x[i] = seed;
		randlc(&seed, NPB_MULTIPLIER);
		state->first_y[i] = seed;
		randlc(&stride, NPB_MULTIPLIER);
		randlc(&stride, NPB_MULTIPLIER);
	}

	/* One batch untimed, which also touches all memory. */
	start_over();
	do_batch();
	return true;
}

static double relative_error(double value, double reference)
{
	return absolute((value - reference) / reference);
}

static void run(struct npb_run *run)
{
	uint64_t batches = (1ul << problem->log2_points) / BATCH, pairs = 0, start;
	double error_x, error_y;

	start_over();
	start = rdtsc();
	for (unsigned i = 1; i <= PROGRESS_LINES; i++) {
		for (uint64_t batch = 0; batch < batches / PROGRESS_LINES; batch++)
			do_batch();
		npb_progress(i, PROGRESS_LINES);
	}
	run->cycles = rdtsc() - start;
	for (unsigned i = 0; i < RINGS; i++)
		pairs += state->ring[i];
	error_x = relative_error(state->sum_x, problem->sum_x);
	error_y = relative_error(state->sum_y, problem->sum_y);
	run->value = error_x > error_y ? state->sum_x : state->sum_y;
	run->reference = error_x > error_y ? problem->sum_x : problem->sum_y;
	run->error = error_x > error_y ? error_x : error_y;
	run->verified = error_x <= TOLERANCE && error_y <= TOLERANCE && pairs == problem->pairs;
}

const struct npb_kernel npb_ep = {"EP", prepare, run};
