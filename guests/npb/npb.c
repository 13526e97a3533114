/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Runs one kernel as the command line says. */
#include "npb.h"

static const struct npb_kernel *const kernels[] = {&npb_cg, &npb_ep, &npb_ft, &npb_is, &npb_mg};

static const struct npb_kernel *kernel;
static char problem_class;

struct npb_watch npb_watch;

static char upper(char c)
{
	return c >= 'a' && c <= 'z' ? (char)(c - 'a' + 'A') : c;
}

static bool same_name(const char *a, const char *b)
{
	while (*a != '\0' && upper(*a) == upper(*b)) {
		a++;
		b++;
	}
	return upper(*a) == upper(*b);
}

static const struct npb_kernel *find_kernel(const char *name)
{
	for (size_t i = 0; i < sizeof(kernels) / sizeof(kernels[0]); i++) {
		if (same_name(kernels[i]->name, name))
			return kernels[i];
	}
	fail("npb: error: no kernel %s", name);
}

/* Found in an image by its mark: examples/python/read_image.py. */
static volatile struct {
	char mark[16];
	uint32_t iteration, iterations;
} progress = {"NPB-PROGRESS-V1", 0, 0};

void npb_progress(unsigned iteration, unsigned iterations)
{
	progress.iteration = iteration;
	progress.iterations = iterations;
	print("npb: %s class %c iteration %u/%u tsc=%lu\n", kernel->name, problem_class, iteration, iterations,
	      rdtsc());
	npb_watch.last_look = rdtsc(); /* printing is no gap */
}

static void prepare(void)
{
	uint64_t start = rdtsc();

	print("npb: %s class %c init tsc=%lu\n", kernel->name, problem_class, start);
	if (!kernel->prepare(problem_class))
		fail("npb: error: %s has no class %c", kernel->name, problem_class);
	print("npb: %s class %c ready tsc=%lu init_cycles=%lu\n", kernel->name, problem_class, rdtsc(),
	      rdtsc() - start);
}

/* 0 where the TSC's rate is not known. */
static double seconds_of(uint64_t cycles)
{
	uint64_t khz = tsc_khz();

	return khz == 0 ? 0 : (double)cycles / (double)khz / 1000;
}

static void report(const struct npb_run *run)
{
	print("npb: %s class %c time_s=%.6f tsc_khz=%lu tsc_cycles=%lu max_gap=%lu\n", kernel->name, problem_class,
	      seconds_of(run->cycles), tsc_khz(), run->cycles, npb_watch.max_gap);
	print("Verification = %s value=%.13e reference=%.13e error=%.3e\n",
	      run->verified ? "SUCCESSFUL" : "UNSUCCESSFUL", run->value, run->reference, run->error);
}

void guest_main(void)
{
	uint64_t repeat = arg_number("repeat", 1);
	uint64_t cycles = 0, max_gap = 0;
	unsigned failed = 0;

	kernel = find_kernel(arg_text("kernel", "mg"));
	problem_class = upper(arg_text("class", "S")[0]);
	print("npb: start kernel=%s class=%c repeat=%lu tsc_khz=%lu tsc=%lu simd=%s\n", kernel->name, problem_class,
	      repeat, tsc_khz(), rdtsc(), cpu_features()->avx2_fma ? "avx2" : "sse2");
	prepare();
	for (uint64_t i = 0; i < repeat; i++) {
		struct npb_run run = {0};

		npb_watch = (struct npb_watch){.last_look = rdtsc()};
		kernel->run(&run);
		report(&run);
		failed += !run.verified;
		cycles += run.cycles;
		if (npb_watch.max_gap > max_gap)
			max_gap = npb_watch.max_gap;
	}
	print("npb: done runs=%lu failed=%u time_s=%.6f max_gap_us=%lu\n", repeat, failed, seconds_of(cycles),
	      (uint64_t)(seconds_of(max_gap) * 1e6));
}
