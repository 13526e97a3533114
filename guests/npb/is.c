/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * IS: the ranks of small integers, ten times over. A rank is how many keys are
 * less; it is counted by sorting the keys into buckets first, whose counters
 * then stay in the cache.
 */
#include "npb.h"

#define ITERATIONS 10
#define TEST_KEYS 5
#define LOG2_BUCKETS 9
#define BUCKETS (1u << LOG2_BUCKETS)
#define LOOK_KEYS 16384 /* at most 0.1 ms or so */
#define LOOK_SCATTERED 128 /* where each key may go to another page */
#define CHECKS (ITERATIONS * TEST_KEYS + 1)

/*
 * Every iteration makes one key in the middle small and another one large, so
 * that a rank in the lower half rises by one, and one in the upper half sinks.
 * Ranks are given as they would be in an iteration 0.
 */
struct problem {
	char problem_class;
	unsigned log2_keys, log2_values;
	uint32_t test_index[TEST_KEYS], test_rank[TEST_KEYS];
};

static const struct problem problems[] = {
	{'S', 16, 11, {48427, 17148, 23627, 62548, 4431}, {0, 18, 346, 64917, 65463}},
	{'W', 20, 16, {357773, 934767, 875723, 898999, 404505}, {1247, 11696, 1039987, 1043896, 1048018}},
	{'A', 23, 19, {2112377, 662041, 5336171, 3642833, 4250760}, {103, 17522, 123927, 8288933, 8388265}},
	{'B', 25, 21, {41869, 812306, 5102857, 18232239, 26860214}, {33422937, 10244, 59149, 33135281, 99}},
	{'C', 27, 23, {44172927, 72999161, 74326391, 129606274, 21736814},
	 {61147, 882988, 266290, 133997595, 133525895}},
};

static const struct problem *problem;
static uint32_t key_count, value_count;

/* The keys as they were made, by buckets, and in order. */
static uint32_t *keys, *bucketed, *sorted;
static uint32_t *rank_of; /* of each value a key may have */
static uint64_t sum_of_keys;
static uint32_t first_keys[2 * ITERATIONS + 1]; /* those that iterations replace */

static void set_key(uint32_t index, uint32_t key)
{
	sum_of_keys += key;
	sum_of_keys -= keys[index];
	keys[index] = key;
}

/* Four random numbers a key, which makes those in the middle more frequent. */
static void make_keys(void)
{
	uint64_t seed = NPB_SEED;

	for (uint32_t i = 0; i < key_count; i++) {
		double sum = 0;

		for (unsigned j = 0; j < 4; j++)
			sum += randlc(&seed, NPB_MULTIPLIER);
		keys[i] = (uint32_t)((double)(value_count / 4) * sum);
		sum_of_keys += keys[i];
	}
	memcpy(first_keys, keys, sizeof(first_keys));
}

static void sort_into_buckets(uint32_t *bucket_end)
{
	unsigned shift = problem->log2_values - LOG2_BUCKETS;
	uint32_t count = 0;

	memset(bucket_end, 0, BUCKETS * sizeof(*bucket_end));
	for (uint32_t i = 0; i < key_count; i++) {
		bucket_end[keys[i] >> shift]++;
		if (i % LOOK_KEYS == 0)
			npb_look();
	}
	for (unsigned i = 0; i < BUCKETS; i++) {
		uint32_t length = bucket_end[i];

		bucket_end[i] = count;
		count += length;
	}
	/* What was the start of each bucket becomes its end. */
	for (uint32_t i = 0; i < key_count; i++) {
		bucketed[bucket_end[keys[i] >> shift]++] = keys[i];
		if (i % LOOK_SCATTERED == 0)
			npb_look();
	}
}

static void rank_keys(void)
{
	uint32_t values = value_count / BUCKETS; /* of each bucket */
	uint32_t bucket_end[BUCKETS], at = 0;

	sort_into_buckets(bucket_end);
	for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
		uint32_t *rank = rank_of + bucket * values;
		uint32_t below = at;

		memset(rank, 0, values * sizeof(*rank));
		for (; at < bucket_end[bucket]; at++) {
			rank[bucketed[at] & (values - 1)]++;
			if (at % LOOK_KEYS == 0)
				npb_look();
		}
		for (uint32_t value = 0; value < values; value++) {
			uint32_t count = rank[value];

			rank[value] = below;
			below += count;
		}
	}
}

static void iterate(unsigned iteration)
{
	set_key(iteration, iteration);
	set_key(iteration + ITERATIONS, value_count - iteration);
	rank_keys();
}

/* Returns how many of the keys have the rank they should. */
static unsigned check_some_ranks(unsigned iteration)
{
	unsigned passed = 0;

	for (unsigned i = 0; i < TEST_KEYS; i++) {
		uint32_t rank = problem->test_rank[i];

		rank = rank < key_count / 2 ? rank + iteration : rank - iteration;
		passed += rank_of[keys[problem->test_index[i]]] == rank;
	}
	return passed;
}

/* Puts each key where its rank says: true if that is in order, and if the keys
   are still those that were made. Spoils the ranks. */
static bool check_all_ranks(void)
{
	uint64_t sum = 0;

	memset(sorted, 0, key_count * sizeof(*sorted));
	for (uint32_t i = 0; i < key_count; i++) {
		uint32_t at = rank_of[keys[i]]++;

		if (at >= key_count)
			return false;
		sorted[at] = keys[i];
	}
	for (uint32_t i = 0; i < key_count; i++) {
		if (i > 0 && sorted[i - 1] > sorted[i])
			return false;
		sum += sorted[i];
	}
	return sum == sum_of_keys;
}

static bool prepare(char problem_class)
{
	for (size_t i = 0; i < sizeof(problems) / sizeof(problems[0]); i++) {
		if (problems[i].problem_class == problem_class)
			problem = &problems[i];
	}
	if (problem == NULL)
		return false;
	key_count = 1u << problem->log2_keys;
	value_count = 1u << problem->log2_values;
	keys = arena_alloc(key_count * sizeof(*keys), PAGE_BYTES);
	bucketed = arena_alloc(key_count * sizeof(*bucketed), PAGE_BYTES);
	sorted = arena_alloc(key_count * sizeof(*sorted), PAGE_BYTES);
	rank_of = arena_alloc(value_count * sizeof(*rank_of), PAGE_BYTES);
	make_keys();

	/* One iteration untimed, which with the check also touches all memory. */
	iterate(1);
	check_all_ranks();
	return true;
}

static void run(struct npb_run *run)
{
	uint64_t start;
	unsigned passed = 0;

	for (uint32_t i = 0; i <= 2 * ITERATIONS; i++)
		set_key(i, first_keys[i]);
	start = rdtsc();
	for (unsigned i = 1; i <= ITERATIONS; i++) {
		iterate(i);
		passed += check_some_ranks(i);
		npb_progress(i, ITERATIONS);
	}
	run->cycles = rdtsc() - start;
	passed += check_all_ranks();
	run->value = passed;
	run->reference = CHECKS;
	run->error = (double)(CHECKS - passed) / CHECKS;
	run->verified = passed == CHECKS;
}

const struct npb_kernel npb_is = {"IS", prepare, run};
