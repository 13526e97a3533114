/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * CG: the smallest eigenvalue of a large sparse matrix by inverse power
 * iteration, each step of which solves a system by 25 iterations of the
 * conjugate gradient method. The matrix is a weighted sum of outer products
 * of sparse random vectors.
 */
#include "elementary.h"

#define CG_STEPS 25
#define CONDITION 0.1
#define TOLERANCE 1e-10
#define LOOK_ROWS 512 /* of a product: at most 0.1 ms or so */
#define VECTOR_MAX 16 /* elements of a sparse vector, with its diagonal */

struct problem {
	char problem_class;
	uint32_t order, nonzeros, iterations;
	double shift, reference;
};

static const struct problem problems[] = {
	{'S', 1400, 7, 15, 10, 8.5971775078648},
	{'W', 7000, 8, 15, 12, 10.362595087124},
	{'A', 14000, 11, 15, 20, 17.130235054029},
	{'B', 75000, 13, 75, 60, 22.712745482631},
	{'C', 150000, 15, 75, 110, 28.973605592845},
};

struct sparse_vector {
	uint32_t count;
	uint32_t index[VECTOR_MAX];
	double value[VECTOR_MAX];
};

static const struct problem *problem;

/* The matrix by rows: row i has entries row_start[i] up to row_start[i + 1]. */
static uint64_t *row_start;
static uint32_t *column;
static double *entry;

static double *x, *z, *p, *q, *r;

static void set_element(struct sparse_vector *vector, uint32_t index, double value)
{
	uint32_t at = 0;

	while (at < vector->count && vector->index[at] != index)
		at++;
	vector->index[at] = index;
	vector->value[at] = value;
	if (at == vector->count)
		vector->count++;
}

static bool has_element(const struct sparse_vector *vector, uint32_t index)
{
	for (uint32_t i = 0; i < vector->count; i++) {
		if (vector->index[i] == index)
			return true;
	}
	return false;
}

/* Positions are drawn from the next power of two, and those outside the
   vector or taken already are dropped, together with their values. */
static void random_vector(struct sparse_vector *vector, uint64_t *seed)
{
	uint32_t range = 1;

	while (range < problem->order)
		range *= 2;
	vector->count = 0;
	while (vector->count < problem->nonzeros) {
		double value = randlc(seed, NPB_MULTIPLIER);
		uint32_t index = (uint32_t)((double)range * randlc(seed, NPB_MULTIPLIER));

		if (index < problem->order && !has_element(vector, index))
			set_element(vector, index, value);
	}
}

static void add_outer_product(uint64_t *row_end, const struct sparse_vector *vector, uint32_t diagonal, double weight)
{
	for (uint32_t i = 0; i < vector->count; i++) {
		uint32_t at_row = vector->index[i];
		double scale = weight * vector->value[i];

		for (uint32_t j = 0; j < vector->count; j++) {
			uint64_t at = row_end[at_row]++;
			double value = scale * vector->value[j];

			if (i == j && at_row == diagonal)
				value += CONDITION - problem->shift;
			column[at] = vector->index[j];
			entry[at] = value;
		}
	}
}

/* Adds up what fell on the same element, and closes the gaps. `seen` has a
   place for each column. */
static void merge_duplicates(const uint64_t *row_end, uint64_t *seen)
{
	uint64_t to = 0;

	for (uint32_t i = 0; i < problem->order; i++)
		seen[i] = 0;
	for (uint32_t i = 0; i < problem->order; i++) {
		uint64_t from = row_start[i], first = to;

		row_start[i] = first;
		for (; from < row_end[i]; from++) {
			uint64_t known = seen[column[from]];

			/* Places are stored plus one; an older row's are below `first`. */
			if (known > first) {
				entry[known - 1] += entry[from];
				continue;
			}
			column[to] = column[from];
			entry[to++] = entry[from];
			seen[column[from]] = to;
		}
	}
	row_start[problem->order] = to;
}

static void make_matrix(void)
{
	uint32_t order = problem->order;
	struct sparse_vector *vectors = arena_alloc(order * sizeof(*vectors), PAGE_BYTES);
	uint64_t *row_end = arena_alloc((order + 1) * sizeof(uint64_t), PAGE_BYTES);
	uint64_t *seen = arena_alloc(order * sizeof(uint64_t), PAGE_BYTES);
	uint64_t seed = NPB_SEED, entries = 0;
	double weight = 1, ratio = exponential(natural_logarithm(CONDITION) / order); /* order-th root */

	row_start = arena_alloc((order + 1) * sizeof(uint64_t), PAGE_BYTES);
	for (uint32_t i = 0; i <= order; i++)
		row_end[i] = 0;
	randlc(&seed, NPB_MULTIPLIER); /* the definition drops the first */
	for (uint32_t i = 0; i < order; i++) {
		random_vector(&vectors[i], &seed);
		set_element(&vectors[i], i, 0.5);
		for (uint32_t j = 0; j < vectors[i].count; j++)
			row_end[vectors[i].index[j]] += vectors[i].count;
	}
	for (uint32_t i = 0; i < order; i++) {
		uint64_t length = row_end[i];

		row_start[i] = entries;
		row_end[i] = entries;
		entries += length;
	}
	column = arena_alloc(entries * sizeof(*column), PAGE_BYTES);
	entry = arena_alloc(entries * sizeof(*entry), PAGE_BYTES);
	for (uint32_t i = 0; i < order; i++) {
		add_outer_product(row_end, &vectors[i], i, weight);
		weight *= ratio;
	}
	merge_duplicates(row_end, seen);
}

static void multiply(double *restrict to, const double *restrict from)
{
	for (uint32_t i = 0; i < problem->order; i++) {
		uint64_t at = row_start[i], end = row_start[i + 1];
		double sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;

		/* Four sums, so that an addition need not wait for the last. */
		for (; at + 4 <= end; at += 4) {
			sum0 += entry[at] * from[column[at]];
			sum1 += entry[at + 1] * from[column[at + 1]];
			sum2 += entry[at + 2] * from[column[at + 2]];
			sum3 += entry[at + 3] * from[column[at + 3]];
		}
		for (; at < end; at++)
			sum0 += entry[at] * from[column[at]];
		to[i] = (sum0 + sum1) + (sum2 + sum3);
		if (i % LOOK_ROWS == 0)
			npb_look();
	}
}

static double dot(const double *a, const double *b)
{
	double sum = 0;

	for (uint32_t i = 0; i < problem->order; i++)
		sum += a[i] * b[i];
	return sum;
}

/* Solves A z = x about; returns the norm of what is left. */
static double conjugate_gradient(void)
{
	uint32_t order = problem->order;
	double rho, sum = 0;

	for (uint32_t i = 0; i < order; i++) {
		z[i] = 0;
		r[i] = x[i];
		p[i] = x[i];
	}
	rho = dot(r, r);
	for (unsigned step = 0; step < CG_STEPS; step++) {
		double alpha, beta, rho_before = rho;

		multiply(q, p);
		alpha = rho / dot(p, q);
		for (uint32_t i = 0; i < order; i++) {
			z[i] += alpha * p[i];
			r[i] -= alpha * q[i];
		}
		rho = dot(r, r);
		beta = rho / rho_before;
		for (uint32_t i = 0; i < order; i++)
			p[i] = r[i] + beta * p[i];
	}
	multiply(r, z);
	for (uint32_t i = 0; i < order; i++)
		sum += (x[i] - r[i]) * (x[i] - r[i]);
	return square_root(sum);
}

static void start_over(void)
{
	for (uint32_t i = 0; i < problem->order; i++)
		x[i] = 1;
}

/* One power iteration; returns the eigenvalue it finds. */
static double iterate(void)
{
	double zeta, scale;

	conjugate_gradient();
	zeta = problem->shift + 1 / dot(x, z);
	scale = 1 / square_root(dot(z, z));
	for (uint32_t i = 0; i < problem->order; i++)
		x[i] = scale * z[i];
	return zeta;
}

static bool prepare(char problem_class)
{
	double **const vectors[] = {&x, &z, &p, &q, &r};

	for (size_t i = 0; i < sizeof(problems) / sizeof(problems[0]); i++) {
		if (problems[i].problem_class == problem_class)
			problem = &problems[i];
	}
	if (problem == NULL)
		return false;
	for (size_t i = 0; i < sizeof(vectors) / sizeof(vectors[0]); i++)
		*vectors[i] = arena_alloc(problem->order * sizeof(double), PAGE_BYTES);
	make_matrix();

	/* One iteration untimed. */
	start_over();
	iterate();
	return true;
}

static void run(struct npb_run *run)
{
	uint64_t start;
	double difference;

	start_over();
	start = rdtsc();
	for (unsigned i = 1; i <= problem->iterations; i++) {
		run->value = iterate();
		npb_progress(i, problem->iterations);
	}
	run->cycles = rdtsc() - start;
	run->reference = problem->reference;
	difference = run->value - run->reference;
	run->error = (difference < 0 ? -difference : difference) / run->reference;
	run->verified = run->error <= TOLERANCE;
}

const struct npb_kernel npb_cg = {"CG", prepare, run};
