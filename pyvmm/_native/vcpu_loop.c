#include "vcpu_loop.h"

#include <errno.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

/* Any signal with a handler interrupts KVM_RUN; this one nobody else uses. */
#define KICK_SIGNAL (SIGRTMIN + 4)

struct vcpu {
    int fd;
    struct kvm_run *run;
    const struct io_bus *pio;
    const struct io_bus *mmio;

    pthread_mutex_t lock; /* guards `thread` and `running` against vcpu_kick */
    pthread_t thread;
    bool running;
    bool kicked; /* atomic */

    /* A string instruction (INS/OUTS) exits once for many elements: the next one to serve. */
    uint32_t element;
    struct vcpu_io io;
    bool has_exit; /* KVM_RUN has returned one that run_guest has not seen */
    int error;
    struct vcpu_counters counters;
};

static void on_kick(int signal)
{
    (void)signal;
}

int vcpu_setup_signal(void)
{
    struct sigaction action = {.sa_handler = on_kick};
    return sigaction(KICK_SIGNAL, &action, NULL) < 0 ? -errno : 0;
}

struct vcpu *vcpu_create(int fd, struct kvm_run *run, const struct io_bus *pio,
                         const struct io_bus *mmio)
{
    struct vcpu *vcpu = calloc(1, sizeof(*vcpu));
    if (!vcpu)
        return NULL;
    pthread_mutex_init(&vcpu->lock, NULL);
    vcpu->fd = fd;
    vcpu->run = run;
    vcpu->pio = pio;
    vcpu->mmio = mmio;
    return vcpu;
}

void vcpu_destroy(struct vcpu *vcpu)
{
    if (!vcpu)
        return;
    pthread_mutex_destroy(&vcpu->lock);
    free(vcpu);
}

void vcpu_kick(struct vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->lock);
    __atomic_store_n(&vcpu->kicked, true, __ATOMIC_RELEASE);
    /* immediate_exit catches a vCPU that is about to enter KVM_RUN, the signal one inside it. */
    __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_RELEASE);
    if (vcpu->running)
        pthread_kill(vcpu->thread, KICK_SIGNAL);
    pthread_mutex_unlock(&vcpu->lock);
}

static bool take_kick(struct vcpu *vcpu)
{
    if (!__atomic_load_n(&vcpu->kicked, __ATOMIC_ACQUIRE))
        return false;
    pthread_mutex_lock(&vcpu->lock);
    vcpu->kicked = false;
    vcpu->run->immediate_exit = 0;
    pthread_mutex_unlock(&vcpu->lock);
    return true;
}

/* True when the access was answered; else vcpu->io is set for Python. */
static bool serve(struct vcpu *vcpu, bool is_mmio, uint64_t addr, uint8_t *data, uint32_t len,
                  bool is_write)
{
    switch (io_bus_access(is_mmio ? vcpu->mmio : vcpu->pio, addr, data, len, is_write)) {
    case IO_UNCLAIMED:
        vcpu->counters.unclaimed++;
        return true;
    case IO_DONE:
        return true;
    case IO_PYTHON:
        break;
    }
    vcpu->counters.python++;
    vcpu->io = (struct vcpu_io){
        .is_mmio = is_mmio, .is_write = is_write, .len = len, .addr = addr, .data = data};
    return false;
}

/* Serves the elements of a port access that are left; false when the next is Python's. */
static bool serve_pio(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;

    while (vcpu->element < run->io.count) {
        uint8_t *at = data + (size_t)vcpu->element * run->io.size;
        vcpu->element++;
        if (!serve(vcpu, false, run->io.port, at, run->io.size,
                   run->io.direction == KVM_EXIT_IO_OUT))
            return false;
    }
    vcpu->element = 0;
    return true;
}

static enum vcpu_result run_guest(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;

    if (vcpu->element && !serve_pio(vcpu))
        return VCPU_IO;
    for (;;) {
        if (vcpu->has_exit) {
            vcpu->has_exit = false;
        } else if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
            /* EAGAIN: an application processor that was woken before its start-up IPI. */
            if (errno != EINTR && errno != EAGAIN) {
                vcpu->error = errno;
                return VCPU_FAILED;
            }
            if (take_kick(vcpu))
                return VCPU_KICKED;
            continue;
        }
        vcpu->counters.exits++;
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            vcpu->counters.pio++;
            if (!serve_pio(vcpu))
                return VCPU_IO;
            break;
        case KVM_EXIT_MMIO:
            vcpu->counters.mmio++;
            if (!serve(vcpu, true, run->mmio.phys_addr, run->mmio.data, run->mmio.len,
                       run->mmio.is_write))
                return VCPU_IO;
            break;
        case KVM_EXIT_INTR:
            break;
        default:
            return VCPU_EXIT;
        }
    }
}

enum vcpu_result vcpu_run(struct vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->lock);
    vcpu->thread = pthread_self();
    vcpu->running = true;
    pthread_mutex_unlock(&vcpu->lock);

    enum vcpu_result result = run_guest(vcpu);

    pthread_mutex_lock(&vcpu->lock);
    vcpu->running = false;
    pthread_mutex_unlock(&vcpu->lock);
    return result;
}

/* KVM looks at requests before it looks at signals, and at immediate_exit before either: so a signal
 * that is pending when KVM_RUN begins, which takes a mask that lets it in only there. */
static void run_with_signal(struct vcpu *vcpu)
{
    enum { SIGSET_SIZE = 8 }; /* the kernel's */
    struct kvm_signal_mask header = {.len = SIGSET_SIZE};
    uint8_t mask[sizeof(header) + SIGSET_SIZE];
    sigset_t kick;
    sigset_t before;

    sigemptyset(&kick);
    sigaddset(&kick, KICK_SIGNAL);
    pthread_sigmask(SIG_BLOCK, &kick, &before);
    memcpy(mask, &header, sizeof(header));
    memcpy(mask + sizeof(header), &before, SIGSET_SIZE);
    if (ioctl(vcpu->fd, KVM_SET_SIGNAL_MASK, mask) == 0) {
        pthread_kill(pthread_self(), KICK_SIGNAL);
        vcpu->has_exit = ioctl(vcpu->fd, KVM_RUN, 0) == 0;
        ioctl(vcpu->fd, KVM_SET_SIGNAL_MASK, NULL);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Whether there is an event that KVM took from the interrupt controller for the next entry: from there
 * it does not end a halt any more. */
static bool has_event(struct vcpu *vcpu)
{
    struct kvm_vcpu_events events;

    return ioctl(vcpu->fd, KVM_GET_VCPU_EVENTS, &events) < 0 || events.interrupt.injected ||
           events.nmi.injected || events.nmi.pending || events.exception.injected;
}

void vcpu_settle(struct vcpu *vcpu)
{
    struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE};
    struct kvm_mp_state before;

    if (vcpu->has_exit || ioctl(vcpu->fd, KVM_GET_MP_STATE, &before) < 0)
        return;
    bool halted = before.mp_state == KVM_MP_STATE_HALTED;
    if (!halted && before.mp_state != KVM_MP_STATE_RUNNABLE)
        return; /* it waits for its start-up IPI */
    /* Requests of a halted vCPU wait for an interrupt. */
    if (halted && ioctl(vcpu->fd, KVM_SET_MP_STATE, &runnable) < 0)
        return;
    run_with_signal(vcpu);
    if (halted && !has_event(vcpu))
        ioctl(vcpu->fd, KVM_SET_MP_STATE, &before);
}

const struct vcpu_io *vcpu_pending_io(const struct vcpu *vcpu)
{
    return &vcpu->io;
}

int vcpu_error(const struct vcpu *vcpu)
{
    return vcpu->error;
}

struct vcpu_counters vcpu_counters(const struct vcpu *vcpu)
{
    return vcpu->counters;
}
