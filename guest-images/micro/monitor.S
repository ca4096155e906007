# A guest that obeys its serial port: it prints "> " and then follows single letters.
#
#   p  power off          r  reset                 x  triple fault
#   s  spin forever       c  report a panic        h  halt with interrupts off
#   u  read an address that is neither RAM nor a device, and print the byte
#   any other byte comes back
#
# A vmlinux for pyvmm: entered at _start in 64-bit mode. The ports are those of pyvmm/layout.py.

    .set COM1, 0x3f8
    .set LSR, COM1 + 5
    .set PM1_CONTROL, 0x604
    .set RESET, 0xcf9
    .set PVPANIC, 0x505

    .section .text
    .globl _start
    .code64
_start:
    mov $'>', %al
    call put
    mov $' ', %al
    call put
next:
    mov $LSR, %dx
    in %dx, %al
    test $1, %al
    jz next
    mov $COM1, %dx
    in %dx, %al
    cmp $'p', %al
    je power_off
    cmp $'r', %al
    je reset
    cmp $'x', %al
    je triple_fault
    cmp $'s', %al
    je spin
    cmp $'c', %al
    je panic
    cmp $'h', %al
    je halt
    cmp $'u', %al
    je unclaimed
    call put
    jmp next

put:
    mov $COM1, %dx
    out %al, %dx
    ret

power_off:
    mov $PM1_CONTROL, %dx
    mov $(1 << 13 | 5 << 10), %ax
    out %ax, %dx
    jmp halt

reset:
    mov $RESET, %dx
    mov $6, %al
    out %al, %dx
    jmp halt

panic:
    mov $PVPANIC, %dx
    mov $1, %al
    out %al, %dx
    jmp next

unclaimed:
    mov $0x30000000, %ebx
    mov (%rbx), %al
    call put
    jmp next

triple_fault:
    lidt no_idt(%rip)
    ud2

spin:
    jmp spin

halt:
    cli
    hlt
    jmp halt

no_idt:
    .word 0
    .quad 0
