/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * MG: four or more V-cycles of multigrid on a periodic cube, for the Poisson
 * equation with twenty point charges.
 *
 * A grid of n points a side is stored with a border of one point, the image of
 * the opposite side: (n + 2)^3 doubles, the first index fastest.
 */
#include "npb.h"

#define LEVELS_MAX 10
#define CHARGES 10 /* of either sign */
#define SIDE_MAX 514
#define TOLERANCE 1e-8

struct problem {
	char problem_class;
	unsigned log2_side, iterations;
	double reference;
	bool smoother_b;
};

static const struct problem problems[] = {
	{'S', 5, 4, 0.5307707005734e-04, false},
	{'W', 7, 4, 0.6467329375339e-05, false},
	{'A', 8, 4, 0.2433365309069e-05, false},
	{'B', 8, 20, 0.1800564401355e-05, true},
	{'C', 9, 20, 0.5706732285740e-06, true},
};

/* Coefficients by the number of indices in which a neighbour differs. A has
   none for one, S none for three. */
struct stencil {
	double center, face, edge, corner;
};

static const struct stencil operator_a = {-8.0 / 3.0, 0.0, 1.0 / 6.0, 1.0 / 12.0};
static const struct stencil smoother_a = {-3.0 / 8.0, 1.0 / 32.0, -1.0 / 64.0, 0.0};
static const struct stencil smoother_b = {-3.0 / 17.0, 1.0 / 33.0, -1.0 / 61.0, 0.0};
static const struct stencil restriction = {1.0 / 2.0, 1.0 / 4.0, 1.0 / 8.0, 1.0 / 16.0};

struct grid {
	size_t side; /* with the border */
	double *data;
};

static const struct problem *problem;
static const struct stencil *smoother;
static unsigned top;
static struct grid solution[LEVELS_MAX], residual[LEVELS_MAX], charges;

static inline double *row(const struct grid *grid, size_t i2, size_t i3)
{
	return grid->data + (i3 * grid->side + i2) * grid->side;
}

/* The four rows beside a row, and the four across its edges: what a stencil
   needs of the neighbours in the other two directions. */
struct cross {
	const double *beside[4], *across[4];
};

static inline struct cross cross_at(const struct grid *grid, size_t i2, size_t i3)
{
	return (struct cross){
		{row(grid, i2 - 1, i3), row(grid, i2 + 1, i3), row(grid, i2, i3 - 1), row(grid, i2, i3 + 1)},
		{row(grid, i2 - 1, i3 - 1), row(grid, i2 + 1, i3 - 1), row(grid, i2 - 1, i3 + 1),
		 row(grid, i2 + 1, i3 + 1)},
	};
}

static inline __attribute__((always_inline)) void sum_cross(const struct cross *cross, size_t side,
							    double *restrict beside, double *restrict across)
{
	const double *b0 = cross->beside[0], *b1 = cross->beside[1], *b2 = cross->beside[2], *b3 = cross->beside[3];
	const double *a0 = cross->across[0], *a1 = cross->across[1], *a2 = cross->across[2], *a3 = cross->across[3];

	for (size_t i = 0; i < side; i++) {
		beside[i] = b0[i] + b1[i] + b2[i] + b3[i];
		across[i] = a0[i] + a1[i] + a2[i] + a3[i];
	}
}

/* r = v - A u. r may be v. */
static inline __attribute__((always_inline)) void residual_body(const struct grid *u, const struct grid *v,
								const struct grid *r)
{
	const double center = operator_a.center, edge = operator_a.edge, corner = operator_a.corner;
	double beside[SIDE_MAX], across[SIDE_MAX];
	size_t side = u->side;

	for (size_t i3 = 1; i3 < side - 1; i3++) {
		npb_look();
		for (size_t i2 = 1; i2 < side - 1; i2++) {
			struct cross cross = cross_at(u, i2, i3);
			const double *u_row = row(u, i2, i3), *v_row = row(v, i2, i3);
			double *r_row = row(r, i2, i3);

			sum_cross(&cross, side, beside, across);
#pragma GCC ivdep
			for (size_t i = 1; i < side - 1; i++) {
				r_row[i] = v_row[i] - center * u_row[i] -
					   edge * (across[i] + beside[i - 1] + beside[i + 1]) -
					   corner * (across[i - 1] + across[i + 1]);
			}
		}
	}
}

/* u += S r */
static inline __attribute__((always_inline)) void smooth_body(const struct grid *r, const struct grid *u)
{
	const double center = smoother->center, face = smoother->face, edge = smoother->edge;
	double beside[SIDE_MAX], across[SIDE_MAX];
	size_t side = u->side;

	for (size_t i3 = 1; i3 < side - 1; i3++) {
		npb_look();
		for (size_t i2 = 1; i2 < side - 1; i2++) {
			struct cross cross = cross_at(r, i2, i3);
			const double *r_row = row(r, i2, i3);
			double *u_row = row(u, i2, i3);

			sum_cross(&cross, side, beside, across);
#pragma GCC ivdep
			for (size_t i = 1; i < side - 1; i++) {
				u_row[i] += center * r_row[i] + face * (r_row[i - 1] + r_row[i + 1] + beside[i]) +
					    edge * (across[i] + beside[i - 1] + beside[i + 1]);
			}
		}
	}
}

/* coarse = P fine, at every second point. */
static inline __attribute__((always_inline)) void restrict_body(const struct grid *fine, const struct grid *coarse)
{
	double beside[SIDE_MAX], across[SIDE_MAX];

	for (size_t i3 = 1; i3 < coarse->side - 1; i3++) {
		npb_look();
		for (size_t i2 = 1; i2 < coarse->side - 1; i2++) {
			struct cross cross = cross_at(fine, 2 * i2, 2 * i3);
			const double *from = row(fine, 2 * i2, 2 * i3);
			double *to = row(coarse, i2, i3);

			sum_cross(&cross, fine->side, beside, across);
			for (size_t i = 1; i < coarse->side - 1; i++) {
				size_t f = 2 * i;

				to[i] = restriction.center * from[f] +
					restriction.face * (from[f - 1] + from[f + 1] + beside[f]) +
					restriction.edge * (beside[f - 1] + beside[f + 1] + across[f]) +
					restriction.corner * (across[f - 1] + across[f + 1]);
			}
		}
	}
}

/* Adds to one row of the finer grid its share of the coarse rows around it,
   whose sum is given. */
static inline __attribute__((always_inline)) void spread(double *restrict to, const double *restrict sum, double share,
							 size_t coarse_side)
{
	for (size_t i = 0; i < coarse_side - 1; i++) {
		to[2 * i] += share * sum[i];
		to[2 * i + 1] += 0.5 * share * (sum[i] + sum[i + 1]);
	}
}

/* fine += Q coarse: trilinear, border and all. */
static inline __attribute__((always_inline)) void interpolate_body(const struct grid *coarse, const struct grid *fine)
{
	double two_a[SIDE_MAX], two_b[SIDE_MAX], four[SIDE_MAX];
	size_t side = coarse->side;

	for (size_t i3 = 0; i3 < side - 1; i3++) {
		npb_look();
		for (size_t i2 = 0; i2 < side - 1; i2++) {
			const double *here = row(coarse, i2, i3), *next2 = row(coarse, i2 + 1, i3);
			const double *next3 = row(coarse, i2, i3 + 1), *next23 = row(coarse, i2 + 1, i3 + 1);

			for (size_t i = 0; i < side; i++) {
				two_a[i] = here[i] + next2[i];
				two_b[i] = here[i] + next3[i];
				four[i] = two_a[i] + next3[i] + next23[i];
			}
			spread(row(fine, 2 * i2, 2 * i3), here, 1.0, side);
			spread(row(fine, 2 * i2 + 1, 2 * i3), two_a, 0.5, side);
			spread(row(fine, 2 * i2, 2 * i3 + 1), two_b, 0.5, side);
			spread(row(fine, 2 * i2 + 1, 2 * i3 + 1), four, 0.25, side);
		}
	}
}

/* Every body twice: for any x86-64, and for one with AVX2 and FMA. */
struct operators {
	void (*residual)(const struct grid *u, const struct grid *v, const struct grid *r);
	void (*smooth)(const struct grid *r, const struct grid *u);
	void (*restrict_to)(const struct grid *fine, const struct grid *coarse);
	void (*interpolate)(const struct grid *coarse, const struct grid *fine);
};

#define OPERATORS(suffix, attribute)                                                                                   \
	attribute static void residual_##suffix(const struct grid *u, const struct grid *v, const struct grid *r)      \
	{                                                                                                              \
		residual_body(u, v, r);                                                                                \
	}                                                                                                              \
	attribute static void smooth_##suffix(const struct grid *r, const struct grid *u)                              \
	{                                                                                                              \
		smooth_body(r, u);                                                                                     \
	}                                                                                                              \
	attribute static void restrict_##suffix(const struct grid *fine, const struct grid *coarse)                    \
	{                                                                                                              \
		restrict_body(fine, coarse);                                                                           \
	}                                                                                                              \
	attribute static void interpolate_##suffix(const struct grid *coarse, const struct grid *fine)                 \
	{                                                                                                              \
		interpolate_body(coarse, fine);                                                                        \
	}                                                                                                              \
	static const struct operators operators_##suffix = {residual_##suffix, smooth_##suffix, restrict_##suffix,     \
							    interpolate_##suffix}

OPERATORS(sse2, );
OPERATORS(avx2, __attribute__((target("avx2,fma"))));

static const struct operators *operators;

/* Copies each side to the border opposite, one direction after the other so
   that edges and corners come along. */
static void wrap(const struct grid *grid)
{
	size_t side = grid->side, last = side - 2, bytes = side * sizeof(double);

	for (size_t i3 = 1; i3 <= last; i3++) {
		npb_look();
		for (size_t i2 = 1; i2 <= last; i2++) {
			double *at = row(grid, i2, i3);

			at[0] = at[last];
			at[last + 1] = at[1];
		}
		memcpy(row(grid, 0, i3), row(grid, last, i3), bytes);
		memcpy(row(grid, last + 1, i3), row(grid, 1, i3), bytes);
	}
	memcpy(row(grid, 0, 0), row(grid, 0, last), side * bytes);
	memcpy(row(grid, 0, last + 1), row(grid, 0, 1), side * bytes);
}

static void clear(const struct grid *grid)
{
	for (size_t i3 = 0; i3 < grid->side; i3++) {
		npb_look();
		memset(row(grid, 0, i3), 0, grid->side * grid->side * sizeof(double));
	}
}

static void compute_residual(const struct grid *u, const struct grid *v, const struct grid *r)
{
	operators->residual(u, v, r);
	wrap(r);
}

static void smooth(const struct grid *r, const struct grid *u)
{
	operators->smooth(r, u);
	wrap(u);
}

static void v_cycle(void)
{
	for (unsigned level = top; level > 1; level--) {
		operators->restrict_to(&residual[level], &residual[level - 1]);
		wrap(&residual[level - 1]);
	}
	clear(&solution[1]);
	smooth(&residual[1], &solution[1]);
	for (unsigned level = 2; level < top; level++) {
		clear(&solution[level]);
		operators->interpolate(&solution[level - 1], &solution[level]);
		compute_residual(&solution[level], &residual[level], &residual[level]);
		smooth(&residual[level], &solution[level]);
	}
	operators->interpolate(&solution[top - 1], &solution[top]);
	compute_residual(&solution[top], &charges, &residual[top]);
	smooth(&residual[top], &solution[top]);
}

static double residual_norm(void)
{
	const struct grid *r = &residual[top];
	double points = (double)(r->side - 2) * (double)(r->side - 2) * (double)(r->side - 2);
	double sum = 0;

	for (size_t i3 = 1; i3 < r->side - 1; i3++) {
		npb_look();
		for (size_t i2 = 1; i2 < r->side - 1; i2++) {
			const double *at = row(r, i2, i3);
			double part[4] = {0};

			for (size_t i = 1; i < r->side - 1; i++)
				part[i & 3] += at[i] * at[i];
			sum += part[0] + part[1] + part[2] + part[3];
		}
	}
	return square_root(sum / points);
}

/* The ten extreme values seen so far, the least extreme one first. */
struct extremes {
	double value[CHARGES];
	size_t point[CHARGES];
};

static void consider(struct extremes *extremes, double value, size_t point)
{
	unsigned at = 0;

	for (; at + 1 < CHARGES && extremes->value[at + 1] < value; at++) {
		extremes->value[at] = extremes->value[at + 1];
		extremes->point[at] = extremes->point[at + 1];
	}
	extremes->value[at] = value;
	extremes->point[at] = point;
}

static double *charge_at(size_t point)
{
	size_t side = charges.side - 2;

	return row(&charges, point / side % side + 1, point / side / side + 1) + point % side + 1;
}

/* +1 where the random numbers, one a point, are largest, -1 where they are
   smallest. */
static void place_charges(void)
{
	size_t side = charges.side - 2;
	uint64_t seed = NPB_SEED;
	struct extremes largest, smallest;

	for (unsigned i = 0; i < CHARGES; i++) {
		largest.value[i] = 0;
		smallest.value[i] = -1;
	}
	for (size_t point = 0; point < side * side * side; point++) {
		double value = randlc(&seed, NPB_MULTIPLIER);

		if (value > largest.value[0])
			consider(&largest, value, point);
		if (-value > smallest.value[0])
			consider(&smallest, -value, point);
	}
	for (unsigned i = 0; i < CHARGES; i++) {
		*charge_at(largest.point[i]) = 1;
		*charge_at(smallest.point[i]) = -1;
	}
	wrap(&charges);
}

static struct grid new_grid(unsigned level)
{
	struct grid grid = {.side = ((size_t)1 << level) + 2};

	grid.data = arena_alloc(grid.side * grid.side * grid.side * sizeof(double), PAGE_BYTES);
	return grid;
}

static void start_over(void)
{
	clear(&solution[top]);
	compute_residual(&solution[top], &charges, &residual[top]);
}

static bool prepare(char problem_class)
{
	for (size_t i = 0; i < sizeof(problems) / sizeof(problems[0]); i++) {
		if (problems[i].problem_class == problem_class)
			problem = &problems[i];
	}
	if (problem == NULL)
		return false;
	operators = cpu_features()->avx2_fma ? &operators_avx2 : &operators_sse2;
	smoother = problem->smoother_b ? &smoother_b : &smoother_a;
	top = problem->log2_side;
	for (unsigned level = 1; level <= top; level++) {
		solution[level] = new_grid(level);
		residual[level] = new_grid(level);
	}
	charges = new_grid(top);
	place_charges();

	/* One cycle untimed, which also touches all memory. */
	start_over();
	v_cycle();
	return true;
}

static void run(struct npb_run *run)
{
	uint64_t start;
	double difference;

	clear(&solution[top]);
	start = rdtsc();
	compute_residual(&solution[top], &charges, &residual[top]);
	for (unsigned i = 1; i <= problem->iterations; i++) {
		v_cycle();
		compute_residual(&solution[top], &charges, &residual[top]);
		npb_progress(i, problem->iterations);
	}
	run->value = residual_norm();
	run->cycles = rdtsc() - start;
	run->reference = problem->reference;
	difference = run->value - run->reference;
	run->error = (difference < 0 ? -difference : difference) / run->reference;
	run->verified = run->error <= TOLERANCE;
}

const struct npb_kernel npb_mg = {"MG", prepare, run};
