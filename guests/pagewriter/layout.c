/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Where the working set and the fill are, and in which order pages come. */
#include "pagewriter.h"

#define GOLDEN 0x9e3779b97f4a7c15ul

static const char *const fill_names[] = {"none", "zero", "incompressible", "mix"};
static const char *const pattern_names[] = {"seq", "random"};
static const char *const write_names[] = {"word", "page"};

static uint64_t choice(const char *key, const char *const *names, size_t count, uint64_t fallback)
{
	const char *text = arg_text(key, names[fallback]);

	for (size_t i = 0; i < count; i++) {
		if (text_equal(text, names[i]))
			return i;
	}
	fail("pagewriter: error: %s=%s is not known", key, text);
}

static uint64_t percent_of(uint64_t whole, const char *key, uint64_t fallback)
{
	uint64_t percent = arg_number(key, fallback);

	if (percent > 100)
		fail("pagewriter: error: %s=%lu is above 100", key, percent);
	return whole * percent / 100;
}

/* Takes RAM that nothing uses, from whole 2 MiB on; returns what is missing. */
static uint64_t take_pages(uint64_t pages, struct segment *segments, uint64_t *count)
{
	for (unsigned i = 0; i < arena_ranges && pages > 0 && *count < SEGMENTS_MAX; i++) {
		uint64_t start = (arena[i].start + LARGE_PAGE_BYTES - 1) & -LARGE_PAGE_BYTES;
		uint64_t taken;

		if (start >= arena[i].end)
			continue;
		taken = (arena[i].end - start) / PAGE_BYTES;
		if (taken > pages)
			taken = pages;
		segments[*count] = (struct segment){start, taken};
		arena[i].start = start + taken * PAGE_BYTES;
		pages -= taken;
		++*count;
	}
	return pages;
}

static uint64_t free_pages(void)
{
	uint64_t pages = 0;

	for (unsigned i = 0; i < arena_ranges; i++)
		pages += (arena[i].end - arena[i].start) / PAGE_BYTES;
	return pages;
}

static void share_pages(struct header *head)
{
	uint64_t first = 0;

	for (unsigned cpu = 0; cpu < head->vcpus; cpu++) {
		struct vcpu_share *share = &head->share[cpu];

		share->first = first;
		share->pages = head->ws_pages * (cpu + 1) / head->vcpus - first;
		share->order_seed = head->seed * GOLDEN + cpu;
		share->live_gpa = LIVE_GPA(cpu);
		first += share->pages;
	}
}

void layout_make(unsigned vcpus)
{
	struct header *head = header();
	uint64_t bytes = arg_number("ws", 0);
	uint64_t fill;

	if (bytes == 0)
		bytes = percent_of(ram_bytes(), "ws_percent", 25);
	head->magic = HEADER_MAGIC;
	head->version = 1;
	head->vcpus = vcpus;
	head->ws_pages = (bytes + PAGE_BYTES - 1) / PAGE_BYTES;
	head->pattern = choice("pattern", pattern_names, 2, PATTERN_SEQUENTIAL);
	head->write = choice("write", write_names, 2, WRITE_WORD);
	head->fill = choice("fill", fill_names, 4, FILL_INCOMPRESSIBLE);
	head->seed = arg_number("seed", 1);
	head->rate = arg_number("rate", 0);
	head->passes = arg_number("passes", arg_number("iterations", 0));
	head->tsc_khz = tsc_khz();
	if (head->ws_pages < vcpus)
		fail("pagewriter: error: fewer pages than vCPUs");
	if (take_pages(head->ws_pages, head->ws, &head->ws_segments) != 0)
		fail("pagewriter: error: a working set of %lu bytes does not fit", bytes);
	share_pages(head);

	/* At 100 some is left all the same, for the sake of alignment. */
	fill = percent_of(free_pages(), "fill_percent", 100);
	if (head->fill != FILL_NONE)
		take_pages(fill, head->fills, &head->fill_segments);
}

void layout_print(void)
{
	const struct header *head = header();

	print("pagewriter: layout header=0x%lx vcpus=%lu ws_pages=%lu pattern=%s write=%s fill=%s seed=%lu rate=%lu "
	      "tsc_khz=%lu\n",
	      HEADER_GPA, head->vcpus, head->ws_pages, pattern_names[head->pattern], write_names[head->write],
	      fill_names[head->fill], head->seed, head->rate, head->tsc_khz);
	for (uint64_t i = 0; i < head->ws_segments; i++)
		print("pagewriter: ws segment=%lu gpa=0x%lx pages=%lu\n", i, head->ws[i].gpa, head->ws[i].pages);
	for (uint64_t i = 0; i < head->fill_segments; i++)
		print("pagewriter: fill segment=%lu gpa=0x%lx pages=%lu\n", i, head->fills[i].gpa,
		      head->fills[i].pages);
	for (uint64_t cpu = 0; cpu < head->vcpus; cpu++)
		print("pagewriter: vcpu=%lu first=%lu pages=%lu order_seed=0x%lx live=0x%lx\n", cpu,
		      head->share[cpu].first, head->share[cpu].pages, head->share[cpu].order_seed,
		      head->share[cpu].live_gpa);
}

static uint64_t gpa_in(const struct segment *segment, uint64_t index)
{
	while (index >= segment->pages) {
		index -= segment->pages;
		segment++;
	}
	return segment->gpa + index * PAGE_BYTES;
}

uint64_t ws_page_gpa(uint64_t index)
{
	return gpa_in(header()->ws, index);
}

uint64_t fill_page_gpa(uint64_t index)
{
	return gpa_in(header()->fills, index);
}

uint64_t fill_pages(void)
{
	uint64_t pages = 0;

	for (uint64_t i = 0; i < header()->fill_segments; i++)
		pages += header()->fills[i].pages;
	return pages;
}

/*
 * A permutation of 0..pages-1. Each step is one of the next power of two:
 * multiplying by odd numbers modulo it, and folding the high half into the low
 * one. Repeating a permutation until it lands below `pages` is one again.
 */
static uint64_t permute(const struct vcpu_share *share, uint64_t value)
{
	unsigned bits = share->pages > 1 ? 64 - (unsigned)__builtin_clzl(share->pages - 1) : 0;
	uint64_t mask = (1ul << bits) - 1;
	unsigned half = (bits + 1) / 2;

	do {
		value = (value * GOLDEN + share->order_seed) & mask;
		value ^= value >> half;
		value = value * 0xbf58476d1ce4e5b9ul & mask;
		value ^= value >> half;
		value = value * 0x94d049bb133111ebul & mask;
	} while (value >= share->pages);
	return value;
}

uint64_t page_at_position(const struct vcpu_share *share, uint64_t position)
{
	if (header()->pattern == PATTERN_RANDOM)
		position = permute(share, position);
	return ws_page_gpa(share->first + position);
}
