/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * A small driver for virtio devices on PCI: version 1, MSI-X, split queues,
 * one device and one request list at a time. Follows the virtio specification
 * 1.2, sections 2.7 and 4.1.
 */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "runtime.h"

enum virtio_type {
	VIRTIO_NET = 1,
	VIRTIO_BLK = 2,
	VIRTIO_CONSOLE = 3,
	VIRTIO_RNG = 4,
	VIRTIO_BALLOON = 5,
};

#define VIRTIO_F_VERSION_1 (1ull << 32)

#define QUEUE_SIZE_MAX 128
#define QUEUES_MAX 4

struct virtq_desc {
	uint64_t address;
	uint32_t bytes;
	uint16_t flags, next;
};

#define DESC_NEXT 1
#define DESC_WRITE 2

struct virtq_used_entry {
	uint32_t id, bytes;
};

struct virtqueue {
	uint16_t size, taken; /* how many used entries were looked at */
	struct virtq_desc *desc;
	volatile uint16_t *driver;  /* flags, index, ring */
	volatile uint16_t *device;  /* flags, index, then entries */
	volatile uint16_t *notify;
	uint16_t number;
};

struct virtio_device {
	unsigned slot, irq;
	enum virtio_type type;
	volatile uint8_t *common, *notify, *config;
	uint32_t notify_step;
	uint64_t features;
	struct virtqueue queues[QUEUES_MAX];
};

/* A buffer of a request; the device writes it where `writable`. */
struct buffer {
	const volatile void *address;
	uint32_t bytes;
	bool writable;
};

/* Finds the `index`th device of a type, from 0; false where there is none. */
bool virtio_find(struct virtio_device *device, enum virtio_type type, unsigned index);

/* Resets the device and sets it up with so many queues, of those features that
   it offers as well. Its interrupts arrive as `irq`. */
void virtio_open(struct virtio_device *device, uint64_t features, unsigned queues, unsigned irq);

/* Lets the device go on: after the first buffers are in its queues. */
void virtio_ready(struct virtio_device *device);

/* Orders memory as devices see it, and as a checkpoint does. */
static inline void memory_barrier(void)
{
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* Makes a request of descriptors from `first` on. A device that is still at
   work may take it at once; virtio_kick tells one that is not. */
void virtio_put(struct virtqueue *queue, uint16_t first, const struct buffer *buffers, unsigned count);
void virtio_kick(struct virtqueue *queue);

/* Takes the next finished request; false where there is none yet. */
bool virtio_take(struct virtqueue *queue, struct virtq_used_entry *entry);

/* Waits for the next finished request, halted. */
struct virtq_used_entry virtio_wait(struct virtio_device *device, struct virtqueue *queue);

/* Whether the device gave up: DEVICE_NEEDS_RESET. */
bool virtio_failed(const struct virtio_device *device);
unsigned virtio_status(const struct virtio_device *device);

uint64_t virtio_config64(const struct virtio_device *device, unsigned offset);
uint32_t virtio_config32(const struct virtio_device *device, unsigned offset);

#endif
