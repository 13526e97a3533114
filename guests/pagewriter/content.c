/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* What stands in pages: eight interleaved xorshift64 streams, one a word of a
   64-byte row, which no compressor shortens and vector units write fast. */
#include "pagewriter.h"

typedef uint64_t row __attribute__((vector_size(64), aligned(64)));

#define GOLDEN 0x9e3779b97f4a7c15ul

/* A pass number for fill pages, which belong to none. */
#define FILL_PASS ~0ul

/* splitmix64's last step: neighbouring numbers become unlike. */
static uint64_t scatter(uint64_t value)
{
	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ul;
	value = (value ^ value >> 27) * 0x94d049bb133111ebul;
	return value ^ value >> 31;
}

static inline __attribute__((always_inline)) row first_row(uint64_t gpa, uint64_t pass)
{
	uint64_t key = pass * GOLDEN;
	row state;

	for (unsigned lane = 0; lane < ROW_WORDS; lane++)
		state[lane] = scatter((gpa + lane) ^ key) | 1;
	return state;
}

static inline __attribute__((always_inline)) row next_row(row state)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

/* Writes rows `from` to 63. Row 0 is the stream's start, unless skipped. */
static inline __attribute__((always_inline)) void write_stream(uint64_t gpa, uint64_t pass, unsigned from)
{
	volatile row *rows = (volatile row *)gpa;
	row state = first_row(gpa, pass);

	if (from == 0)
		rows[0] = state;
	for (unsigned i = 1; i < PAGE_WORDS / ROW_WORDS; i++) {
		state = next_row(state);
		rows[i] = state;
	}
}

static bool has_stream(uint64_t gpa, uint64_t pass, unsigned from, unsigned words)
{
	const uint64_t *word = (const uint64_t *)gpa;
	row state = first_row(gpa, pass);

	for (unsigned i = 0; i < words; i++) {
		if (i > 0 && i % ROW_WORDS == 0)
			state = next_row(state);
		if (i >= from && word[i] != state[i % ROW_WORDS])
			return false;
	}
	return true;
}

static uint64_t check_word(const struct ws_page *page)
{
	return page->magic ^ page->gpa ^ page->vcpu ^ page->position ^ page->vcpu_pages ^ page->seed;
}

void ws_page_write(uint64_t gpa, unsigned vcpu, uint64_t position, uint64_t pass)
{
	struct ws_page *page = (struct ws_page *)gpa;

	page->magic = PAGE_MAGIC;
	page->gpa = gpa;
	page->vcpu = vcpu;
	page->pass = pass;
	page->position = position;
	page->vcpu_pages = header()->share[vcpu].pages;
	page->seed = header()->seed;
	page->check = check_word(page);
	write_stream(gpa, pass, 1);
	page->pass_again = pass;
}

/* Everything but the word `pass`, which the caller knows. */
bool ws_page_is_whole(uint64_t gpa, uint64_t pass)
{
	const struct ws_page *page = (const struct ws_page *)gpa;

	return page->magic == PAGE_MAGIC && page->gpa == gpa && page->check == check_word(page) &&
	       page->pass_again == pass && has_stream(gpa, pass, ROW_WORDS, PAGE_WORDS - 1);
}

/* Of `mix`, one page in four is zero, one repeats a row, two are streams. */
static enum fill fill_kind(uint64_t index)
{
	enum fill kind = (enum fill)header()->fill;

	if (kind != FILL_MIX || index % 4 == 1)
		return kind;
	return index % 4 == 0 ? FILL_ZERO : FILL_INCOMPRESSIBLE;
}

void fill_page_write(uint64_t gpa, uint64_t index)
{
	row first;

	switch (fill_kind(index)) {
	case FILL_ZERO:
		memset((void *)gpa, 0, PAGE_BYTES);
		break;
	case FILL_INCOMPRESSIBLE:
		write_stream(gpa, FILL_PASS, 0);
		break;
	case FILL_MIX:
		first = first_row(gpa, FILL_PASS);
		for (unsigned i = 0; i < PAGE_WORDS / ROW_WORDS; i++)
			((row *)gpa)[i] = first;
		break;
	case FILL_NONE:
		break;
	}
}

bool fill_page_is_whole(uint64_t gpa, uint64_t index)
{
	const uint64_t *word = (const uint64_t *)gpa;
	enum fill kind = fill_kind(index);
	row first = first_row(gpa, FILL_PASS);

	if (kind == FILL_INCOMPRESSIBLE)
		return has_stream(gpa, FILL_PASS, 0, PAGE_WORDS);
	for (unsigned i = 0; i < PAGE_WORDS; i++) {
		if (word[i] != (kind == FILL_ZERO ? 0 : first[i % ROW_WORDS]))
			return false;
	}
	return true;
}
