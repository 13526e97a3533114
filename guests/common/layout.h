/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Numbers that assembly, C and the linker script share. */
#ifndef LAYOUT_H
#define LAYOUT_H

#define SEL_KERNEL_CODE 0x08
#define SEL_KERNEL_DATA 0x10
#define SEL_USER_CODE 0x1b
#define SEL_USER_DATA 0x23
#define SEL_KERNEL_CODE32 0x28
#define SEL_TSS0 0x30 /* one 16-byte descriptor per vCPU from here on */

#define MAX_CPUS 32
#define GDT_ENTRIES (6 + 2 * MAX_CPUS)

/* 104 bytes of TSS, 8 KiB of I/O bitmap, and the byte of ones that ends it. */
#define TSS_IO_BITMAP 104
#define TSS_LIMIT (TSS_IO_BITMAP + 8192)
#define TSS_BYTES (TSS_LIMIT + 8)

#define KERNEL_STACK_BYTES 4096
#define USER_STACK_BYTES 65536

/* Where the real-mode start of an AP is copied to; SIPI takes a page number. */
#define TRAMPOLINE_GPA 0x8000

/* Vectors of the interrupts that echo takes: 0x20 + IRQ. */
#define IRQ_VECTOR 0x20
#define IRQ_COUNT 16

/* Services of the CPL0 stub, see kernel_call() in runtime.h. */
#define SERVICE_SET_CR3 0
#define SERVICE_WAIT 1
#define SERVICE_READ_MSR 2
#define SERVICE_WRITE_MSR 3
#define SERVICE_WRITE_COM1 4
#define SERVICE_TRIPLE_FAULT 5

#define COM1 0x3f8
#define COM1_LINE_STATUS (COM1 + 5)
#define LINE_STATUS_CAN_SEND 0x20

/* A UART that nobody reads must not stop the guest. */
#define SEND_POLLS_MAX 64

#define MSR_EFER 0xc0000080

#endif
