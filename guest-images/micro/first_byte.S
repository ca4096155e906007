# A guest that writes one byte to its serial port and halts, for scripts/bench. It is entered at
# _start in 64-bit mode by pyvmm, and at pvh_start in 32-bit mode by monitors that boot PVH kernels
# (Xen's docs/misc/pvh.pandoc); the instructions are the same in both modes.

    .set COM1, 0x3f8
    .set XEN_ELFNOTE_PHYS32_ENTRY, 18

    .section .text
    .globl _start
_start:
pvh_start:
    mov $COM1, %dx
    mov $'!', %al
    out %al, %dx
    cli
halt:
    hlt
    jmp halt

    .section .note.pvh, "a", @note
    .align 4
    .long name_end - name
    .long entry_end - entry
    .long XEN_ELFNOTE_PHYS32_ENTRY
name:
    .asciz "Xen"
name_end:
    .align 4
entry:
    .quad pvh_start
entry_end:
