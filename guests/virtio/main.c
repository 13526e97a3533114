/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Drives the machine's virtio devices, one kind after the other. */
#include "guest.h"

void guest_main(void)
{
	const char *mode = arg_text("disk", "records");

	irq_init();
	print("virtio: start tsc=%lu tsc_khz=%lu ram=%lu\n", rdtsc(), tsc_khz(), ram_bytes());
	if (!blk_open()) {
		if (!console_echo())
			fail("virtio: there is neither a disk nor a console");
	} else if (text_equal(mode, "throughput"))
		blk_throughput();
	else if (text_equal(mode, "records"))
		blk_records();
	else
		fail("virtio: disk=%s is neither records nor throughput", mode);
}
