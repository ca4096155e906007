/* The KVM_RUN loop of one vCPU: exits that C can answer never leave it. */
#ifndef PYVMM_VCPU_LOOP_H
#define PYVMM_VCPU_LOOP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io_bus.h"

struct kvm_run;

/* An access for Python. For a read, Python fills `data` before it calls vcpu_run again. */
struct vcpu_io {
    bool is_mmio; /* else an I/O port */
    bool is_write;
    uint32_t len;
    uint64_t addr;
    uint8_t *data;
};

enum vcpu_result {
    VCPU_KICKED, /* vcpu_kick was called */
    VCPU_IO,     /* vcpu.io is for Python */
    VCPU_EXIT,   /* an exit that ends the guest or is unknown: see run->exit_reason */
    VCPU_FAILED, /* KVM_RUN failed with vcpu.error (errno) */
};

struct vcpu_counters {
    uint64_t exits;
    uint64_t pio;
    uint64_t mmio;
    uint64_t python;
    uint64_t unclaimed;
};

struct vcpu;

/* `run` is the mapped kvm_run of `fd`. Ports and addresses are looked up in the two buses.
 * NULL with errno set on failure. */
struct vcpu *vcpu_create(int fd, struct kvm_run *run, const struct io_bus *pio,
                         const struct io_bus *mmio);
void vcpu_destroy(struct vcpu *vcpu);

/* Runs the guest on the calling thread until something is Python's. */
enum vcpu_result vcpu_run(struct vcpu *vcpu);

/* Has KVM do what was asked of it for the next entry, such as to rewrite the page of kvmclock, without
 * executing code of the guest. On the thread of vcpu_run, between two of its calls. */
void vcpu_settle(struct vcpu *vcpu);

/* Makes the current or the next vcpu_run return VCPU_KICKED, soon. Any thread. */
void vcpu_kick(struct vcpu *vcpu);

const struct vcpu_io *vcpu_pending_io(const struct vcpu *vcpu);
int vcpu_error(const struct vcpu *vcpu);
struct vcpu_counters vcpu_counters(const struct vcpu *vcpu);

/* Installs the (empty) handler of the signal that interrupts KVM_RUN. Once a process; 0 or -errno. */
int vcpu_setup_signal(void);

#endif
