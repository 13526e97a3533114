/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * FT: the heat equation on a periodic box, solved by a Fourier transform in
 * three dimensions there, and back once for each moment that is asked for.
 */
#include "elementary.h"

#define DIFFUSION 1e-6
#define TOLERANCE 1e-12
#define CHECKSUM_POINTS 1024
#define LANES 8 /* lines that are transformed at the same time */

struct complex_number {
	double re, im;
};

static const struct complex_number checksums_s[] = {
	{554.6087004964, 484.5363331978}, {554.6385409189, 486.5304269511}, {554.6148406171, 488.3910722336},
	{554.5423607415, 490.1273169046}, {554.4255039624, 491.7475857993}, {554.2683411902, 493.2597244941},
};
static const struct complex_number checksums_w[] = {
	{567.3612178944, 529.3246849175}, {563.1436885271, 528.2149986629}, {559.4024089970, 527.0996558037},
	{556.0698047020, 526.0027904925}, {553.0898991250, 524.9400845633}, {550.4159734538, 523.9212247086},
};
static const struct complex_number checksums_a[] = {
	{504.6735008193, 511.4047905510}, {505.9412319734, 509.8809666433}, {506.9376896287, 509.8144042213},
	{507.7892868474, 510.1336130759}, {508.5233095391, 510.4914655194}, {509.1487099959, 510.7917842803},
};
static const struct complex_number checksums_b[] = {
	{517.7643571579, 507.7803458597}, {515.4521291263, 508.8249431599}, {514.6409228649, 509.6208912659},
	{514.2378756213, 510.1023387619}, {513.9626667737, 510.3976610617}, {513.7423460082, 510.5948019802},
	{513.5547056878, 510.7404165783}, {513.3910925466, 510.8576573661}, {513.2470705390, 510.9577278523},
	{513.1197729984, 511.0460304483}, {513.0070319283, 511.1252433800}, {512.9070537032, 511.1968077718},
	{512.8182883502, 511.2616233064}, {512.7393733383, 511.3203605551}, {512.6691062020, 511.3735928093},
	{512.6064276004, 511.4218460548}, {512.5504076570, 511.4656139760}, {512.5002331720, 511.5053595966},
	{512.4551951846, 511.5415130407}, {512.4146770029, 511.5744692211},
};
static const struct complex_number checksums_c[] = {
	{519.5078707457, 514.9019699238}, {515.5422171134, 512.7578201997}, {514.4678022222, 512.2251847514},
	{514.0150594328, 512.1090289018}, {513.7550426810, 512.1143685824}, {513.5811056728, 512.1496764568},
	{513.4569343165, 512.1870921893}, {513.3651975661, 512.2193250322}, {513.2955192805, 512.2454735794},
	{513.2410471738, 512.2663649603}, {513.1971141679, 512.2830879827}, {513.1605205716, 512.2965869718},
	{513.1290734194, 512.3075927445}, {513.1012720314, 512.3166486553}, {513.0760908195, 512.3241541685},
	{513.0528295923, 512.3304037599}, {513.0310107773, 512.3356167976}, {513.0103090133, 512.3399592211},
	{512.9905029333, 512.3435588985}, {512.9714421109, 512.3465164008},
};

struct problem {
	char problem_class;
	size_t nx, ny, nz;
	unsigned iterations;
	const struct complex_number *checksums;
};

static const struct problem problems[] = {
	{'S', 64, 64, 64, 6, checksums_s},
	{'W', 128, 128, 32, 6, checksums_w},
	{'A', 256, 256, 128, 6, checksums_a},
	{'B', 512, 256, 256, 20, checksums_b},
	{'C', 512, 512, 512, 20, checksums_c},
};

/* A point of each of some lines. */
struct lanes {
	double re[LANES], im[LANES];
};

static const struct problem *problem;
static size_t nx, ny, nz;

/* Boxes of nx ny nz numbers, the first index fastest: what is solved, as its
   Fourier transform, and the solution at one moment. */
static struct complex_number *spectrum, *solution;

static struct lanes *work[2]; /* lines under way */
static size_t root_count;
static struct complex_number *roots; /* of unity: e^(-2 pi i k / root_count) */
static double *decay_x, *decay_y, *decay_z; /* of a frequency from a moment to the next */

static inline struct complex_number *row(struct complex_number *box, size_t y, size_t z)
{
	return box + (z * ny + y) * nx;
}

/*
 * One step of `count` transforms of `length` points each, which leaves four
 * times as many of a quarter of the length. Point i of all of them comes before
 * point i + 1 of any; with a second array to go to (Stockham's algorithm) it
 * stays so, and the result is in order.
 */
static inline __attribute__((always_inline)) void step_by_four(const struct lanes *restrict from,
							       struct lanes *restrict to, size_t length, size_t count)
{
	size_t quarter = length / 4, stride = root_count / length;

	for (size_t i = 0; i < quarter; i++) {
		struct complex_number root1 = roots[i * stride];
		struct complex_number root2 = roots[2 * i * stride];
		struct complex_number root3 = roots[3 * i * stride];

		for (size_t j = 0; j < count; j++) {
			const struct lanes *a = from + count * i + j, *b = a + count * quarter;
			const struct lanes *c = b + count * quarter, *d = c + count * quarter;
			struct lanes *to0 = to + 4 * count * i + j, *to1 = to0 + count;
			struct lanes *to2 = to1 + count, *to3 = to2 + count;

#pragma GCC ivdep
			for (unsigned l = 0; l < LANES; l++) {
				double sum_ac_re = a->re[l] + c->re[l], sum_ac_im = a->im[l] + c->im[l];
				double sum_bd_re = b->re[l] + d->re[l], sum_bd_im = b->im[l] + d->im[l];
				double dif_ac_re = a->re[l] - c->re[l], dif_ac_im = a->im[l] - c->im[l];
				double dif_bd_re = b->re[l] - d->re[l], dif_bd_im = b->im[l] - d->im[l];
				double re1 = dif_ac_re + dif_bd_im, im1 = dif_ac_im - dif_bd_re;
				double re2 = sum_ac_re - sum_bd_re, im2 = sum_ac_im - sum_bd_im;
				double re3 = dif_ac_re - dif_bd_im, im3 = dif_ac_im + dif_bd_re;

				to0->re[l] = sum_ac_re + sum_bd_re;
				to0->im[l] = sum_ac_im + sum_bd_im;
				to1->re[l] = re1 * root1.re - im1 * root1.im;
				to1->im[l] = re1 * root1.im + im1 * root1.re;
				to2->re[l] = re2 * root2.re - im2 * root2.im;
				to2->im[l] = re2 * root2.im + im2 * root2.re;
				to3->re[l] = re3 * root3.re - im3 * root3.im;
				to3->im[l] = re3 * root3.im + im3 * root3.re;
			}
		}
	}
}

/* The last step where the length is no power of four: transforms of two points. */
static inline __attribute__((always_inline)) void step_by_two(const struct lanes *restrict from,
							      struct lanes *restrict to, size_t count)
{
	for (size_t j = 0; j < count; j++) {
		const struct lanes *a = from + j, *b = a + count;
		struct lanes *to0 = to + j, *to1 = to0 + count;

#pragma GCC ivdep
		for (unsigned l = 0; l < LANES; l++) {
			to0->re[l] = a->re[l] + b->re[l];
			to0->im[l] = a->im[l] + b->im[l];
			to1->re[l] = a->re[l] - b->re[l];
			to1->im[l] = a->im[l] - b->im[l];
		}
	}
}

/* The points of a line along z are a plane apart: a look only after the line would
   take the time in which all of memory was touched for one gap. */
static inline __attribute__((always_inline)) void look_now_and_then(size_t point)
{
	if (point % 4 == 0)
		npb_look();
}

/* Transforms LANES lines of `length` points: the distances are those from a
   point to the next one of a line, and from a line to the next one. */
static inline __attribute__((always_inline)) void transform_lines(struct complex_number *first, size_t length,
								  size_t point_distance, size_t line_distance)
{
	struct lanes *from = work[0], *to = work[1], *swap;
	size_t count = 1;

	for (size_t i = 0; i < length; i++) {
		const struct complex_number *points = first + i * point_distance;

		look_now_and_then(i);
		for (unsigned l = 0; l < LANES; l++) {
			from[i].re[l] = points[l * line_distance].re;
			from[i].im[l] = points[l * line_distance].im;
		}
	}
	for (size_t left = length; left > 1; left /= 4) {
		if (left == 2)
			step_by_two(from, to, count);
		else
			step_by_four(from, to, left, count);
		swap = from;
		from = to;
		to = swap;
		count *= 4;
	}
	for (size_t i = 0; i < length; i++) {
		struct complex_number *points = first + i * point_distance;

		look_now_and_then(i);
		for (unsigned l = 0; l < LANES; l++) {
			points[l * line_distance].re = from[i].re[l];
			points[l * line_distance].im = from[i].im[l];
		}
	}
	npb_look();
}

static inline __attribute__((always_inline)) void transform_body(struct complex_number *box)
{
	for (size_t z = 0; z < nz; z++) {
		for (size_t y = 0; y < ny; y += LANES)
			transform_lines(row(box, y, z), nx, 1, nx);
		for (size_t x = 0; x < nx; x += LANES)
			transform_lines(row(box, 0, z) + x, ny, nx, 1);
	}
	for (size_t y = 0; y < ny; y++) {
		for (size_t x = 0; x < nx; x += LANES)
			transform_lines(row(box, y, 0) + x, nz, nx * ny, 1);
	}
}

static void transform_sse2(struct complex_number *box)
{
	transform_body(box);
}

__attribute__((target("avx2,fma"))) static void transform_avx2(struct complex_number *box)
{
	transform_body(box);
}

static void (*transform)(struct complex_number *box);

/* The spectrum of the next moment, twice: to go on from, and to transform. */
static void evolve(void)
{
	for (size_t z = 0; z < nz; z++) {
		for (size_t y = 0; y < ny; y++) {
			struct complex_number *from = row(spectrum, y, z), *to = row(solution, y, z);
			double decay = decay_y[y] * decay_z[z];

			for (size_t x = 0; x < nx; x++) {
				from[x].re *= decay_x[x] * decay;
				from[x].im *= decay_x[x] * decay;
				to[x] = from[x];
			}
			npb_look();
		}
	}
}

/* Back is as there but for a factor and the direction of the axes: the checksum
   looks at point -i instead of i. */
static void iterate(void)
{
	evolve();
	transform(solution);
}

static struct complex_number checksum(void)
{
	double points = (double)(nx * ny * nz);
	struct complex_number sum = {0, 0};

	for (size_t i = 1; i <= CHECKSUM_POINTS; i++) {
		/* Sizes are powers of two, so that wrapping at 2^64 does no harm. */
		const struct complex_number *at = row(solution, -3 * i % ny, -5 * i % nz) + -i % nx;

		sum.re += at->re / points;
		sum.im += at->im / points;
	}
	return sum;
}

/* Random numbers, and their transform. This is timed, as NASA defines it. */
static void start_over(void)
{
	uint64_t seed = NPB_SEED;

	for (size_t z = 0; z < nz; z++) {
		for (size_t y = 0; y < ny; y++) {
			struct complex_number *to = row(spectrum, y, z);

			for (size_t x = 0; x < nx; x++) {
				to[x].re = randlc(&seed, NPB_MULTIPLIER);
				to[x].im = randlc(&seed, NPB_MULTIPLIER);
			}
			npb_look();
		}
	}
	transform(spectrum);
}

/* Frequencies of the second half are negative ones. */
static double *new_decay(size_t count)
{
	double *decay = arena_alloc(count * sizeof(*decay), PAGE_BYTES);

	for (size_t i = 0; i < count; i++) {
		double frequency = (double)(i < count / 2 ? i : count - i);

		decay[i] = exponential(-4 * DIFFUSION * PI * PI * frequency * frequency);
	}
	return decay;
}

static size_t larger(size_t a, size_t b)
{
	return a > b ? a : b;
}

static bool prepare(char problem_class)
{
	size_t bytes;

	for (size_t i = 0; i < sizeof(problems) / sizeof(problems[0]); i++) {
		if (problems[i].problem_class == problem_class)
			problem = &problems[i];
	}
	if (problem == NULL)
		return false;
	transform = cpu_features()->avx2_fma ? transform_avx2 : transform_sse2;
	nx = problem->nx;
	ny = problem->ny;
	nz = problem->nz;
	bytes = nx * ny * nz * sizeof(struct complex_number);
	spectrum = arena_alloc(bytes, PAGE_BYTES);
	solution = arena_alloc(bytes, PAGE_BYTES);
	decay_x = new_decay(nx);
	decay_y = new_decay(ny);
	decay_z = new_decay(nz);
	root_count = larger(nx, larger(ny, nz));
	work[0] = arena_alloc(root_count * sizeof(struct lanes), PAGE_BYTES);
	work[1] = arena_alloc(root_count * sizeof(struct lanes), PAGE_BYTES);
	roots = arena_alloc(root_count * sizeof(*roots), PAGE_BYTES);
	for (size_t i = 0; i < root_count; i++) {
		cosine_and_sine(i, root_count, &roots[i].re, &roots[i].im);
		roots[i].im = -roots[i].im;
	}

	/* One iteration untimed, which also touches all memory. */
	start_over();
	iterate();
	return true;
}

static double modulus(struct complex_number number)
{
	return square_root(number.re * number.re + number.im * number.im);
}

/* Keeps the worst checksum, or the first one that is too bad. */
static void check(struct npb_run *run, struct complex_number sum, struct complex_number reference)
{
	struct complex_number difference = {sum.re - reference.re, sum.im - reference.im};
	double error = modulus(difference) / modulus(reference);

	if (!run->verified || error < run->error)
		return;
	run->value = modulus(sum);
	run->reference = modulus(reference);
	run->error = error;
	run->verified = error <= TOLERANCE;
}

static void run(struct npb_run *run)
{
	uint64_t start = rdtsc();

	run->verified = true;
	start_over();
	for (unsigned i = 1; i <= problem->iterations; i++) {
		iterate();
		check(run, checksum(), problem->checksums[i - 1]);
		npb_progress(i, problem->iterations);
	}
	run->cycles = rdtsc() - start;
}

const struct npb_kernel npb_ft = {"FT", prepare, run};
