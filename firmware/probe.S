/* What a Linux kernel asks of its CPU and a KVM may lack: run by pyvmm/kvm/probe.py.
 *
 * scripts/generate-bindings assembles this into pyvmm/kvm/_generated_probe.py. It is loaded at
 * guest-physical 0 and entered at `entry` in 64-bit ring 0, with the first 2 MiB mapped one to one
 * for both rings, GDT, IDT and TR set, and no interrupt controller. Before each step its number
 * goes to `step`; HLT ends the run, with STEP_DONE in `step` when all went well. An exception that
 * no step expects leaves its number in `vector`. */

/* What the steps are called: names for the host. */
    .set STEP_START, 0
    .set STEP_SYSCALL, 1
    .set STEP_SYSRET, 2
    .set STEP_INT80, 3
    .set STEP_INT3, 4
    .set STEP_FWAIT, 5
    .set STEP_LDMXCSR, 6
    .set STEP_STAC, 7
    .set STEP_POPCNT, 8
    .set STEP_CMPXCHG16B, 9
    .set STEP_XRSTOR, 10
    .set STEP_HYPERCALL, 11
    .set STEP_DONE, 12

/* Bits of `features`: instructions that the guest's CPUID has. */
    .set FEATURE_SMAP, 1
    .set FEATURE_POPCNT, 2
    .set FEATURE_CX16, 4
    .set FEATURE_XSAVE, 8
    .set FEATURE_VMMCALL, 16

    .set KERNEL_CS, 0x08
    .set USER_SS, 0x23
    .set USER_CS, 0x2b
    .set SYSRET_BASE, 0x1b          /* SYSRET loads SS from here + 8 and CS from here + 16 */
    .set KERNEL_STACK, 0x5000
    .set USER_STACK, 0x6000
    .set SCRATCH, 0x6000            /* 1 KiB for XSAVE, zeroed */

    .set MSR_STAR, 0xc0000081
    .set MSR_LSTAR, 0xc0000082
    .set MSR_SFMASK, 0xc0000084
    .set EXCEPTIONS, 32
    .set NO_VECTOR, 0xff
    .set NO_SUCH_HYPERCALL, 0x7fffffff
    .set KVM_ENOSYS, 1000

    .macro begin number
    movl $\number, step
    .endm

    .macro skip_unless feature, to
    testl $\feature, features
    jz \to
    .endm

    .code64
    .text
    .globl entry
entry:
    xorl %edx, %edx
    movl $MSR_LSTAR, %ecx
    movl $on_syscall, %eax
    wrmsr
    movl $MSR_SFMASK, %ecx
    xorl %eax, %eax
    wrmsr
    movl $MSR_STAR, %ecx
    movl $(SYSRET_BASE << 16 | KERNEL_CS), %edx
    wrmsr

    begin STEP_SYSCALL
    pushq $USER_SS
    pushq $USER_STACK
    pushq $2                        /* RFLAGS: nothing but the bit that is always set */
    pushq $USER_CS
    pushq $in_ring3
    iretq

in_ring3:
    syscall
after_syscall:
    movl %cs, %eax
    cmpl $USER_CS, %eax
    jne fail_ring3

    begin STEP_INT80
    xorl %ebx, %ebx
    int $0x80
    cmpl $1, %ebx
    jne fail_ring3
    int $0x80                       /* the second one stays in ring 0 */
fail_ring3:
    int $0x80                       /* HLT is not for ring 3; ends as a failure of this step */

on_syscall:
    movl %cs, %eax
    cmpl $KERNEL_CS, %eax
    jne fail
    cmpq $after_syscall, %rcx
    jne fail
    begin STEP_SYSRET
    sysretq

on_int80:
    movl %cs, %eax
    cmpl $KERNEL_CS, %eax
    jne fail
    cmpl $USER_CS, 8(%rsp)
    jne fail
    cmpl $STEP_INT80, step
    jne fail
    testl %ebx, %ebx
    jnz in_ring0
    incl %ebx
    iretq

in_ring0:
    begin STEP_INT3
    xorl %ebx, %ebx
    int3
    cmpl $3, %ebx
    jne fail

    begin STEP_FWAIT
    fninit
    fwait

    begin STEP_LDMXCSR
    ldmxcsr mxcsr

    skip_unless FEATURE_SMAP, 1f
    begin STEP_STAC
    stac
    clac
1:
    skip_unless FEATURE_POPCNT, 1f
    begin STEP_POPCNT
    movl $0xf0f, %eax
    popcnt %eax, %eax
    cmpl $8, %eax
    jne fail
1:
    skip_unless FEATURE_CX16, 1f
    begin STEP_CMPXCHG16B
    xorl %eax, %eax
    xorl %edx, %edx
    movl $1, %ebx
    movl $2, %ecx
    lock cmpxchg16b SCRATCH
    jnz fail
    cmpq $2, SCRATCH + 8
    jne fail
    movq $0, SCRATCH
    movq $0, SCRATCH + 8
1:
    skip_unless FEATURE_XSAVE, 1f
    begin STEP_XRSTOR
    xorl %ecx, %ecx
    xorl %edx, %edx
    movl $3, %eax                   /* XCR0: x87 and SSE */
    xsetbv
    xsave SCRATCH
    xrstor SCRATCH
1:
    begin STEP_HYPERCALL
    movl $NO_SUCH_HYPERCALL, %eax
    skip_unless FEATURE_VMMCALL, 1f
    vmmcall
    jmp 2f
1:
    vmcall
2:
    cmpq $-KVM_ENOSYS, %rax
    jne fail

    begin STEP_DONE
fail:
    hlt
    jmp fail

on_int3:
    movl $3, %ebx
    iretq

/* Exceptions: `call` pushes an address that tells the vector. */
    .balign 8, 0xcc
stubs:
    .rept EXCEPTIONS
    call on_exception
    .balign 8, 0xcc
    .endr
on_exception:
    popq %rax
    subl $stubs, %eax
    shrl $3, %eax
    movl %eax, vector
    jmp fail

    .macro gate offset, dpl
    .word \offset, KERNEL_CS, 0x8e00 | (\dpl << 13), 0
    .quad 0
    .endm

    .balign 16, 0xcc
idt:
    .set number, 0
    .rept EXCEPTIONS
    .if number == 3
    gate on_int3, 0
    .else
    gate (stubs+8*number), 0
    .endif
    .set number, number + 1
    .endr
    .fill 2 * (0x80 - EXCEPTIONS), 8, 0
    gate on_int80, 3
idt_end:

gdt:
    .quad 0
    .quad 0x00af9b000000ffff        /* 0x08: ring-0 code, 64 bits */
    .quad 0x00cf93000000ffff        /* 0x10: ring-0 data */
    .quad 0                         /* 0x18: would be ring-3 code of 32 bits */
    .quad 0x00cff3000000ffff        /* 0x20: ring-3 data */
    .quad 0x00affb000000ffff        /* 0x28: ring-3 code, 64 bits */
    .word tss_end - tss - 1, tss    /* 0x30: TSS, busy */
    .long 0x8b00
    .quad 0
gdt_end:
tss:
    .long 0
    .quad KERNEL_STACK              /* RSP0 */
    .fill 0x5c, 1, 0
tss_end:

    .balign 8
step:
    .long STEP_START
vector:
    .long NO_VECTOR
features:
    .long 0
mxcsr:
    .long 0x1f80
