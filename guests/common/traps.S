/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * All that runs at CPL0 after boot: exceptions, the interrupts of guests that
 * wait, and a few services that CPL3 asks for.
 *
 * A service is asked for with `ud2` at one known address. `int n` would be the
 * usual way, but a hypervisor that emulates CPL0 need not know it, and #UD
 * arrives everywhere.
 */
#include "layout.h"

	.text
	.code64

/* uint64_t kernel_call(service, a, b): see runtime.h */
	.globl kernel_call
kernel_call:
	movl %edi, %eax
kernel_call_site:
	ud2
	ret

	.macro exception vector, has_error
	.balign 32
	.if \has_error == 0
	pushq $0
	.endif
	pushq $\vector
	jmp exception_common
	.endm

/* Vector n starts at exception_stubs + 32 * n. */
	.balign 32
	.globl exception_stubs
exception_stubs:
	.irp vector, 0, 1, 2, 3, 4, 5
	exception \vector, 0
	.endr
	.balign 32
	cmpq $kernel_call_site, (%rsp)
	je service
	jmp 1f
	exception 7, 0
	exception 8, 1
	exception 9, 0
	.irp vector, 10, 11, 12, 13, 14
	exception \vector, 1
	.endr
	.irp vector, 15, 16
	exception \vector, 0
	.endr
	exception 17, 1
	.irp vector, 18, 19, 20
	exception \vector, 0
	.endr
	exception 21, 1
	.irp vector, 22, 23, 24, 25, 26, 27, 28
	exception \vector, 0
	.endr
	exception 29, 1
	exception 30, 1
	exception 31, 0
1:
	pushq $0
	pushq $6

/*
 * Goes back to CPL3 to report: formatting text at CPL0 may be emulated. The
 * first CPU to get here reports; a fault while it does so resets the machine.
 */
exception_common:
	xorl %eax, %eax
	str %ax
	cmpl %eax, panicking_tss
	je triple_fault
	cmpl $0, panicking_tss
	jne halt
	movl %eax, panicking_tss
	popq %rdi /* vector */
	popq %rsi /* error code */
	popq %rdx /* rip */
	movq %cr2, %rcx
	movq 16(%rsp), %r8 /* rsp */
	movq (%rsp), %r9 /* cs */
	pushq $SEL_USER_DATA
	pushq $panic_stack + 4096 - 8
	pushq $2
	pushq $SEL_USER_CODE
	pushq $panic
	iretq

halt:
	hlt
	jmp halt

/* ------------------------------------------------------------------------ */
service:
	addq $2, (%rsp)
	cmpl $SERVICE_WAIT, %eax
	je service_wait
	cmpl $SERVICE_SET_CR3, %eax
	je service_set_cr3
	cmpl $SERVICE_READ_MSR, %eax
	je service_read_msr
	cmpl $SERVICE_WRITE_MSR, %eax
	je service_write_msr
	cmpl $SERVICE_WRITE_COM1, %eax
	je service_write_com1

triple_fault:
	lidt no_idt
	ud2

/* An interrupt that is already pending ends the hlt at once: sti holds it
   back until hlt has begun. */
service_wait:
	sti
	hlt
	cli
	iretq

service_set_cr3:
	movq %rsi, %cr3
	iretq

service_read_msr:
	movl %esi, %ecx
	rdmsr
	shlq $32, %rdx
	orq %rdx, %rax
	iretq

service_write_msr:
	movl %esi, %ecx
	movl %edx, %eax
	shrq $32, %rdx
	wrmsr
	iretq

/* KVM takes one byte of a `rep outsb` per exit. Where CPL0 is emulated, an
   exit from here costs a quarter of one from CPL3. */
service_write_com1:
	movq %rdx, %rcx
	movl $SEND_POLLS_MAX, %edi
	movl $COM1_LINE_STATUS, %edx
1:
	inb %dx, %al
	testb $LINE_STATUS_CAN_SEND, %al
	jnz 2f
	decl %edi
	jnz 1b
2:
	movl $COM1, %edx
	rep outsb
	iretq

/* ------------------------------------------------------------------------ */
/* Only notes which interrupt came; C at CPL3 serves it and sends the EOI. */
	.balign 16
	.globl irq_stubs
irq_stubs:
	.set irq, 0
	.rept IRQ_COUNT
	.balign 16
	orl $(1 << irq), irqs_pending
	iretq
	.set irq, irq + 1
	.endr

	.data
	.balign 8
	.globl irqs_pending
irqs_pending:
	.long 0
panicking_tss:
	.long 0
no_idt:
	.word 0
	.quad 0

	.bss
	.balign 4096
panic_stack:
	.skip 4096

	.section .note.GNU-stack, "", @progbits
