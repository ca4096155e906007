#include "serial16550.h"

#include <errno.h>
#include <linux/kvm.h>
#include <linux/serial_reg.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define PORTS 8
#define FIFO_SIZE 16
#define IIR_FIFOS_ENABLED 0xc0
/* So many reads of LSR with nothing in between: a guest that polls for input. */
#define LISTENING_POLLS 64
/* What the host may take late before the guest sees a transmitter that is not empty. A pipe that
 * polls writable takes at least PIPE_BUF (4096) bytes without blocking. */
#define TRANSMIT_BUFFER 4096

struct serial16550 {
    struct io_range range;
    struct worker_source input;
    struct worker_source output;
    struct worker_source room; /* eventfd: the guest made room in a full receive FIFO */
    struct worker *worker;
    struct console_watch *watch;
    int vm_fd;
    uint32_t gsi;

    pthread_mutex_t lock; /* guards all below */
    bool line;
    bool output_armed; /* in the worker's set: output waits for the host */
    bool input_paused; /* out of the worker's set: the receive FIFO was full, or nobody listens yet */
    bool listening;
    uint32_t polls; /* reads of LSR in a row */
    bool transmit_interrupt; /* latched: the transmitter became empty; reading IIR clears it */
    uint8_t ier, lcr, mcr, scr, fcr;
    uint16_t divisor;
    uint8_t receive[FIFO_SIZE];
    uint32_t receive_head, receive_count;
    uint8_t transmit[TRANSMIT_BUFFER];
    uint32_t transmit_count;
};

static bool fifo_enabled(const struct serial16550 *serial)
{
    return serial->fcr & UART_FCR_ENABLE_FIFO;
}

static uint8_t pending_interrupt(const struct serial16550 *serial)
{
    if ((serial->ier & UART_IER_RDI) && serial->receive_count)
        return UART_IIR_RDI;
    if ((serial->ier & UART_IER_THRI) && serial->transmit_interrupt)
        return UART_IIR_THRI;
    return UART_IIR_NO_INT;
}

static void update_line(struct serial16550 *serial)
{
    bool line = pending_interrupt(serial) != UART_IIR_NO_INT;
    if (line == serial->line)
        return;
    serial->line = line;
    if (serial->vm_fd >= 0) {
        struct kvm_irq_level level = {.irq = serial->gsi, .level = line};
        ioctl(serial->vm_fd, KVM_IRQ_LINE, &level);
    }
}

/* The host's side of the output may be shared with other programs (a terminal), so it is not set
 * to O_NONBLOCK but asked each time. */
static bool output_writable(const struct serial16550 *serial)
{
    struct pollfd poll_fd = {.fd = serial->output.fd, .events = POLLOUT};
    return poll(&poll_fd, 1, 0) > 0;
}

/* A descriptor is in the worker's set only while it is waited for: epoll reports hang-ups even of
 * one that asks for no events. */
static void watch_output(struct serial16550 *serial, bool on)
{
    if (on == serial->output_armed)
        return;
    if (on)
        serial->output_armed = worker_add(serial->worker, &serial->output, EPOLLOUT) == 0;
    else
        serial->output_armed = worker_remove(serial->worker, &serial->output) != 0;
}

static void drain_transmitter(struct serial16550 *serial)
{
    while (serial->transmit_count) {
        if (serial->output.fd >= 0) {
            if (!output_writable(serial)) {
                watch_output(serial, true);
                return;
            }
            ssize_t written = write(serial->output.fd, serial->transmit, serial->transmit_count);
            if (written < 0 && (errno == EINTR || errno == EAGAIN))
                continue;
            if (written >= 0 && (uint32_t)written < serial->transmit_count) {
                serial->transmit_count -= written;
                memmove(serial->transmit, serial->transmit + written, serial->transmit_count);
                continue;
            }
            /* A reader that has gone away (EPIPE, EIO) must not stop the guest. */
        }
        serial->transmit_count = 0;
    }
    watch_output(serial, false);
    if (!serial->transmit_interrupt) {
        serial->transmit_interrupt = true;
        update_line(serial);
    }
}

/* Drivers clear the receiver when they start, so what was typed or piped in before that would be
 * lost. Input waits on the host's side until a driver shows that it wants it. */
static void start_listening(struct serial16550 *serial)
{
    if (serial->listening)
        return;
    serial->listening = true;
    serial->input_paused = false;
    eventfd_signal(serial->room.fd);
}

/* Interrupts for input, and connected (OUT2 does that in a PC): a driver that only probes for the
 * port enables them, too, but does not connect them. */
static void check_listening(struct serial16550 *serial)
{
    if ((serial->ier & UART_IER_RDI) && (serial->mcr & UART_MCR_OUT2) &&
        !(serial->mcr & UART_MCR_LOOP))
        start_listening(serial);
}

static void receive_byte(struct serial16550 *serial, uint8_t byte)
{
    if (serial->receive_count < FIFO_SIZE) {
        uint32_t at = (serial->receive_head + serial->receive_count) % FIFO_SIZE;
        serial->receive[at] = byte;
        serial->receive_count++;
    }
}

static uint8_t read_receiver(struct serial16550 *serial)
{
    if (!serial->receive_count)
        return 0;
    uint8_t byte = serial->receive[serial->receive_head];
    serial->receive_head = (serial->receive_head + 1) % FIFO_SIZE;
    serial->receive_count--;
    if (serial->listening && serial->input_paused && serial->receive_count == 0) {
        serial->input_paused = false;
        eventfd_signal(serial->room.fd);
    }
    return byte;
}

static void write_transmitter(struct serial16550 *serial, uint8_t byte)
{
    if (serial->mcr & UART_MCR_LOOP) {
        receive_byte(serial, byte);
        return;
    }
    console_watch_feed(serial->watch, &byte, 1);
    if (serial->transmit_count == TRANSMIT_BUFFER)
        return; /* an overrun: the driver ignored LSR */
    serial->transmit[serial->transmit_count++] = byte;
    serial->transmit_interrupt = false;
    /* A driver that fills the FIFO looks at another register afterwards, and that writes the whole
     * burst at once (see serial_access); one without the FIFO waits for each byte. */
    if (!fifo_enabled(serial) || serial->transmit_count >= FIFO_SIZE)
        drain_transmitter(serial);
}

static uint8_t line_status(struct serial16550 *serial)
{
    if (++serial->polls == LISTENING_POLLS)
        start_listening(serial);
    uint8_t status = serial->receive_count ? UART_LSR_DR : 0;
    if (!serial->transmit_count)
        status |= UART_LSR_THRE | UART_LSR_TEMT;
    return status;
}

static uint8_t modem_status(const struct serial16550 *serial)
{
    if (!(serial->mcr & UART_MCR_LOOP))
        return UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS;
    return (serial->mcr & UART_MCR_RTS ? UART_MSR_CTS : 0) |
           (serial->mcr & UART_MCR_DTR ? UART_MSR_DSR : 0) |
           (serial->mcr & UART_MCR_OUT1 ? UART_MSR_RI : 0) |
           (serial->mcr & UART_MCR_OUT2 ? UART_MSR_DCD : 0);
}

static uint8_t identify_interrupt(struct serial16550 *serial)
{
    uint8_t iir = pending_interrupt(serial);
    if (iir == UART_IIR_THRI)
        serial->transmit_interrupt = false;
    return iir | (fifo_enabled(serial) ? IIR_FIFOS_ENABLED : 0);
}

static uint8_t read_register(struct serial16550 *serial, uint64_t offset)
{
    bool divisor_access = serial->lcr & UART_LCR_DLAB;

    switch (offset) {
    case UART_RX:
        return divisor_access ? serial->divisor & 0xff : read_receiver(serial);
    case UART_IER:
        return divisor_access ? serial->divisor >> 8 : serial->ier;
    case UART_IIR:
        return identify_interrupt(serial);
    case UART_LCR:
        return serial->lcr;
    case UART_MCR:
        return serial->mcr;
    case UART_LSR:
        return line_status(serial);
    case UART_MSR:
        return modem_status(serial);
    default:
        return serial->scr;
    }
}

static void write_register(struct serial16550 *serial, uint64_t offset, uint8_t value)
{
    bool divisor_access = serial->lcr & UART_LCR_DLAB;

    switch (offset) {
    case UART_TX:
        if (divisor_access)
            serial->divisor = (serial->divisor & 0xff00) | value;
        else
            write_transmitter(serial, value);
        break;
    case UART_IER:
        if (divisor_access) {
            serial->divisor = (serial->divisor & 0xff) | (uint16_t)(value << 8);
        } else {
            /* Enabling the transmitter's interrupt while it is empty raises it at once. */
            if (!(serial->ier & UART_IER_THRI) && !serial->transmit_count)
                serial->transmit_interrupt = true;
            serial->ier = value & 0x0f;
            check_listening(serial);
        }
        break;
    case UART_FCR:
        serial->fcr = value;
        if (value & UART_FCR_CLEAR_RCVR)
            while (serial->receive_count)
                read_receiver(serial);
        break;
    case UART_LCR:
        serial->lcr = value;
        break;
    case UART_MCR:
        serial->mcr = value & 0x1f;
        check_listening(serial);
        break;
    case UART_SCR:
        serial->scr = value;
        break;
    }
}

static bool serial_access(struct io_range *range, uint64_t offset, uint8_t *data, uint32_t len,
                          bool is_write)
{
    struct serial16550 *serial = (struct serial16550 *)range;

    pthread_mutex_lock(&serial->lock);
    for (uint32_t i = 0; i < len; i++) {
        bool transmits = is_write && offset + i == UART_TX;
        if (!transmits && serial->transmit_count && !serial->output_armed)
            drain_transmitter(serial);
        if (is_write || offset + i != UART_LSR)
            serial->polls = 0;
        if (is_write)
            write_register(serial, offset + i, data[i]);
        else
            data[i] = read_register(serial, offset + i);
    }
    update_line(serial);
    pthread_mutex_unlock(&serial->lock);
    return true;
}

static void on_input(struct worker_source *source, uint32_t events)
{
    struct serial16550 *serial =
        (struct serial16550 *)((char *)source - offsetof(struct serial16550, input));
    uint8_t bytes[FIFO_SIZE];
    (void)events;

    pthread_mutex_lock(&serial->lock);
    ssize_t count = read(source->fd, bytes, FIFO_SIZE - serial->receive_count);
    bool ended = count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR);
    for (ssize_t i = 0; i < count; i++)
        receive_byte(serial, bytes[i]);
    serial->input_paused = serial->receive_count == FIFO_SIZE;
    if (ended || serial->input_paused)
        worker_remove(serial->worker, source);
    update_line(serial);
    pthread_mutex_unlock(&serial->lock);
}

static void on_output(struct worker_source *source, uint32_t events)
{
    struct serial16550 *serial =
        (struct serial16550 *)((char *)source - offsetof(struct serial16550, output));
    (void)events;

    pthread_mutex_lock(&serial->lock);
    drain_transmitter(serial);
    pthread_mutex_unlock(&serial->lock);
}

static void on_room(struct worker_source *source, uint32_t events)
{
    struct serial16550 *serial =
        (struct serial16550 *)((char *)source - offsetof(struct serial16550, room));
    (void)events;

    eventfd_take(source->fd);
    if (serial->input.fd >= 0)
        worker_add(serial->worker, &serial->input, EPOLLIN);
}

struct serial16550 *serial16550_create(uint64_t port, int in_fd, int out_fd, int vm_fd,
                                       uint32_t gsi, struct console_watch *watch)
{
    struct serial16550 *serial = calloc(1, sizeof(*serial));
    if (!serial)
        return NULL;
    serial->range =
        (struct io_range){.base = port, .size = PORTS, .access = serial_access};
    serial->input = (struct worker_source){.fd = in_fd, .ready = on_input};
    serial->output = (struct worker_source){.fd = out_fd, .ready = on_output};
    serial->room = (struct worker_source){.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                                          .ready = on_room};
    serial->input_paused = true;
    serial->vm_fd = vm_fd;
    serial->gsi = gsi;
    serial->watch = watch;
    pthread_mutex_init(&serial->lock, NULL);
    serial->worker = worker_create();

    int error = 0;
    if (serial->room.fd < 0 || !serial->worker)
        error = -errno;
    if (!error)
        error = worker_add(serial->worker, &serial->room, EPOLLIN);
    if (error) {
        serial16550_destroy(serial);
        errno = -error;
        return NULL;
    }
    return serial;
}

struct worker *serial16550_worker(struct serial16550 *serial)
{
    return serial->worker;
}

struct io_range *serial16550_range(struct serial16550 *serial)
{
    return &serial->range;
}

void serial16550_flush(struct serial16550 *serial)
{
    pthread_mutex_lock(&serial->lock);
    drain_transmitter(serial);
    pthread_mutex_unlock(&serial->lock);
}

void serial16550_destroy(struct serial16550 *serial)
{
    if (!serial)
        return;
    worker_destroy(serial->worker);
    if (serial->room.fd >= 0)
        close(serial->room.fd);
    pthread_mutex_destroy(&serial->lock);
    free(serial);
}
