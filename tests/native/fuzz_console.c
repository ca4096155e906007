/* Fuzzes two ports of the console device: any rings, any buffers, hosts that come, send, read and
 * go. What must hold whatever driver and host do: no access outside guest memory
 * (AddressSanitizer), each chain returned once (assert), and an end to each run.
 *
 * The input is a few bytes of set-up, then steps in a compact form, so that mutations mostly yield
 * what gets past the ring, then bytes to put anywhere in guest memory. */
#include <fcntl.h>
#include <linux/virtio_ring.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz_input.h"
#include "virtio_console.h"

enum {
    PORTS = 2,
    QUEUE_SIZE = 16,
    RINGS = 0x400, /* of each queue */
    AVAIL = 0x100,
    USED = 0x200,
    BUFFERS = 2 * PORTS * RINGS,
    RAM = 0x8000,
};

enum {
    SETUP_EVENT_IDX = 1,
    SETUP_INDIRECT = 2,
    SETUP_RAW = 4, /* everything that follows goes into the rings */
    SETUP_WATCH = 8,
};

enum { CHAIN, HOST_SENDS, HOST_READS, CONNECT, LEAVE, DISCONNECT, OPEN, RUN, KINDS };

struct ports {
    struct virtio_console *console;
    int own[PORTS], host[PORTS]; /* -1: not connected, has left */
};

/* A chain of up to four descriptors for the queue whose rings are at `rings`. Returns the
 * descriptors taken. */
static unsigned add_chain(struct input *input, uint8_t *ram, uint64_t rings, unsigned desc_index,
                          uint64_t *buffer, bool writable)
{
    struct vring_desc *table = (struct vring_desc *)(ram + rings);
    unsigned shape = (unsigned)take(input, 1);
    unsigned count = 1 + shape % 4;

    for (unsigned i = 0; i < count; i++) {
        uint32_t length = (uint32_t)take(input, 1) * (shape & 0x08 ? 64 : 1);

        if (*buffer + length > RAM)
            *buffer = BUFFERS;
        table[desc_index + i] = (struct vring_desc){
            .addr = *buffer,
            .len = length,
            .flags = (writable ^ !!(shape & 0x80 && i + 1 == count) ? VRING_DESC_F_WRITE : 0) |
                     (i + 1 < count ? VRING_DESC_F_NEXT : 0),
            .next = (uint16_t)(desc_index + i + 1),
        };
        *buffer += length;
    }
    return count;
}

static void run(struct ports *ports)
{
    virtio_console_stop(ports->console); /* so that it makes one pass */
    if (virtio_console_run(ports->console) < 0)
        abort();
}

static void connect_port(struct ports *ports, uint32_t port, unsigned kind)
{
    int fds[2];

    if (ports->own[port] >= 0)
        return;
    if (kind & 1) {
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds) < 0)
            abort();
        if (virtio_console_connect(ports->console, port, fds[0], fds[0]))
            abort();
    } else {
        if (pipe2(fds, O_NONBLOCK) < 0)
            abort();
        if (virtio_console_connect(ports->console, port, kind & 2 ? fds[0] : -1,
                                   kind & 2 ? -1 : fds[1]))
            abort();
        if (!(kind & 2)) {
            int own = fds[1];

            fds[1] = fds[0];
            fds[0] = own;
        }
    }
    ports->own[port] = fds[0];
    ports->host[port] = fds[1];
}

static void leave(struct ports *ports, uint32_t port)
{
    if (ports->host[port] >= 0)
        close(ports->host[port]);
    ports->host[port] = -1;
}

static void disconnect(struct ports *ports, uint32_t port)
{
    virtio_console_disconnect(ports->console, port);
    if (ports->own[port] >= 0)
        close(ports->own[port]);
    ports->own[port] = -1;
    leave(ports, port);
}

static void take_lost(struct ports *ports)
{
    int port;

    for (unsigned i = 0; (port = virtio_console_take_lost(ports->console)) >= 0; i++) {
        if (i == PORTS || ports->own[port] < 0 || ports->host[port] >= 0)
            abort(); /* only who has left is lost */
        disconnect(ports, (uint32_t)port);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t scratch[1 << 16];
    struct input input = {data, size};
    unsigned setup = (unsigned)take(&input, 1);
    uint8_t *ram = calloc(1, RAM); /* on the heap, for AddressSanitizer */
    const struct guest_mem memory = {1, {{0, RAM, ram}}};
    struct virtio_irq irq = {.status = &(uint32_t){0}, .irqfd = -1};
    struct console_watch *watch = console_watch_create(-1);
    int news = eventfd(0, EFD_NONBLOCK), kick[2 * PORTS];
    struct ports ports = {.own = {-1, -1}, .host = {-1, -1}};
    uint64_t buffer = BUFFERS;
    unsigned descs[2 * PORTS] = {0};

    signal(SIGPIPE, SIG_IGN);
    ports.console = virtio_console_create(PORTS, &memory, &irq, news);
    if (!ports.console)
        abort();
    for (unsigned i = 0; i < 2 * PORTS; i++)
        kick[i] = eventfd(0, EFD_NONBLOCK);
    for (unsigned port = 0; port < PORTS; port++) {
        struct virtq_config configs[2];

        for (unsigned i = 0; i < 2; i++) {
            uint64_t base = (2 * port + i) * RINGS;

            configs[i] = (struct virtq_config){base, base + AVAIL, base + USED, QUEUE_SIZE,
                                               setup & SETUP_EVENT_IDX, setup & SETUP_INDIRECT};
        }
        if (virtio_console_set_queues(ports.console, port, &configs[0], kick[2 * port],
                                      &configs[1], kick[2 * port + 1]))
            abort();
        if (setup & SETUP_WATCH)
            virtio_console_set_watch(ports.console, port, watch);
    }

    for (unsigned i = 0; i < 40 && input.size > 0 && !(setup & SETUP_RAW); i++) {
        unsigned what = (unsigned)take(&input, 1);
        uint32_t port = what >> 4 & 1;

        switch (what % 16 % KINDS) {
        case CHAIN: {
            unsigned queue = what >> 4 & 3;
            uint64_t rings = queue * RINGS;
            struct vring_avail *avail = (struct vring_avail *)(ram + rings + AVAIL);

            if (descs[queue] + 4 > QUEUE_SIZE)
                descs[queue] = 0; /* a head twice: hostile */
            avail->ring[avail->idx++ % QUEUE_SIZE] = (uint16_t)descs[queue];
            descs[queue] += add_chain(&input, ram, rings, descs[queue], &buffer, queue % 2 == 0);
            break;
        }
        case HOST_SENDS:
            if (ports.host[port] >= 0 &&
                write(ports.host[port], scratch, (size_t)take(&input, 2) + 1) < 0)
                break;
            break;
        case HOST_READS:
            if (ports.host[port] >= 0 &&
                read(ports.host[port], scratch, (size_t)take(&input, 2) + 1) < 0)
                break;
            break;
        case CONNECT:
            connect_port(&ports, port, what >> 5);
            break;
        case LEAVE:
            leave(&ports, port);
            break;
        case DISCONNECT:
            disconnect(&ports, port);
            break;
        case OPEN:
            virtio_console_set_open(ports.console, port, what & 0x20);
            break;
        case RUN:
            run(&ports);
            take_lost(&ports);
            break;
        }
    }
    for (unsigned i = 0; i < 64 && input.size > 0; i++) {
        uint64_t gpa = take(&input, 2) % RAM;

        ram[setup & SETUP_RAW ? gpa % BUFFERS : gpa] = (uint8_t)take(&input, 1);
    }
    run(&ports);
    run(&ports);
    take_lost(&ports);
    for (uint32_t port = 0; port < PORTS; port++)
        disconnect(&ports, port);
    virtio_console_destroy(ports.console);
    console_watch_destroy(watch);
    for (unsigned i = 0; i < 2 * PORTS; i++)
        close(kick[i]);
    close(news);
    free(ram);
    return 0;
}
