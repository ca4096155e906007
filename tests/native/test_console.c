/* The ports of the console device with real concurrency: drivers, the device's thread, and hosts
 * that send every byte back, stalling now and then. Each byte arrives once and in order.
 *
 *   test_console          a short run
 *   test_console BYTES    a soak: so many on each port */
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>

#include "net_driver.h"
#include "virtio_console.h"

#define BYTES (3u << 20)
#define PORTS 3u

struct console_driver {
    struct guest_mem mem;
    struct net_ring ring[2 * PORTS]; /* receive and transmit queue of each port */
    struct virtio_irq irq;
    uint32_t irq_status;
    int news;
    struct virtio_console *console;
    pthread_t thread;
    int result;
};

static void create(struct console_driver *driver)
{
    uint8_t *ram = calloc(2 * PORTS, NET_RING_BYTES);

    CHECK(ram);
    *driver = (struct console_driver){
        .mem = {1, {{0, 2 * PORTS * NET_RING_BYTES, ram}}},
        .irq = {.irqfd = -1},
        .news = eventfd(0, EFD_NONBLOCK),
    };
    driver->irq.status = &driver->irq_status;
    driver->console = virtio_console_create(PORTS, &driver->mem, &driver->irq, driver->news);
    CHECK(driver->console);
    for (unsigned i = 0; i < 2 * PORTS; i++)
        net_ring_create(&driver->ring[i], ram, i * NET_RING_BYTES, i % 2 == 0);
    for (unsigned port = 0; port < PORTS; port++) {
        struct net_ring *rx = &driver->ring[2 * port], *tx = rx + 1;
        struct virtq_config receive = net_ring_config(2 * port * NET_RING_BYTES);
        struct virtq_config transmit = net_ring_config((2 * port + 1) * NET_RING_BYTES);

        CHECK(virtio_console_set_queues(driver->console, port, &receive, rx->kick, &transmit,
                                        tx->kick) == 0);
    }
}

static void destroy(struct console_driver *driver)
{
    virtio_console_destroy(driver->console);
    for (unsigned i = 0; i < 2 * PORTS; i++)
        close(driver->ring[i].kick);
    close(driver->news);
    free(driver->mem.regions[0].hva);
}

static void *serve(void *argument)
{
    struct console_driver *driver = argument;

    driver->result = virtio_console_run(driver->console);
    return NULL;
}

static void start(struct console_driver *driver)
{
    CHECK(pthread_create(&driver->thread, NULL, serve, driver) == 0);
}

static void stop(struct console_driver *driver)
{
    virtio_console_stop(driver->console);
    CHECK(pthread_join(driver->thread, NULL) == 0);
    CHECK(driver->result == VIRTIO_CONSOLE_STOPPED);
}

static uint8_t byte_at(unsigned port, uint64_t position)
{
    return (uint8_t)((position * 2654435761u >> 7) ^ port);
}

/* What the port's driver sends, and checks. */
struct flow {
    struct console_driver *driver;
    unsigned port;
    uint64_t bytes;
    int host;
    uint64_t received, stalls;
};

static void *run_flow(void *argument)
{
    struct flow *flow = argument;
    struct net_ring *rx = &flow->driver->ring[2 * flow->port], *tx = rx + 1;
    uint64_t sent = 0;
    unsigned in_flight = 0, next = 0, seed = 7 + flow->port;

    for (uint16_t i = 0; i < NET_QUEUE_SIZE; i++)
        net_ring_offer(rx, i);
    net_ring_publish(rx);
    while (flow->received < flow->bytes || in_flight > 0) {
        const struct vring_used_elem *element;
        bool idle = true;

        while (sent < flow->bytes && in_flight < NET_QUEUE_SIZE) {
            uint32_t size = 1 + (uint32_t)rand_r(&seed) % NET_BUFFER;
            uint8_t *data = tx->buffers + (size_t)next * NET_BUFFER;

            if (size > flow->bytes - sent)
                size = (uint32_t)(flow->bytes - sent);
            for (uint32_t i = 0; i < size; i++)
                data[i] = byte_at(flow->port, sent++);
            tx->desc[next].len = size;
            net_ring_offer(tx, (uint16_t)next);
            net_ring_publish(tx);
            next = (next + 1) % NET_QUEUE_SIZE;
            in_flight++;
            idle = false;
        }
        while ((element = net_ring_collect(tx))) {
            CHECK(element->len == 0);
            in_flight--;
            idle = false;
        }
        while ((element = net_ring_collect(rx))) {
            const uint8_t *data = rx->buffers + (size_t)element->id * NET_BUFFER;

            CHECK(element->len > 0 && element->len <= NET_BUFFER);
            for (uint32_t i = 0; i < element->len; i++)
                CHECK(data[i] == byte_at(flow->port, flow->received++));
            if (rand_r(&seed) % 64 == 0) {
                flow->stalls++;
                usleep(200);
            }
            net_ring_offer(rx, (uint16_t)element->id);
            net_ring_publish(rx);
            idle = false;
        }
        if (idle)
            sched_yield();
    }
    return NULL;
}

static void *echo(void *argument)
{
    struct flow *flow = argument;
    static __thread uint8_t data[1 << 16];
    unsigned seed = 77 + flow->port;

    for (uint64_t done = 0; done < flow->bytes;) {
        size_t size = 1 + (size_t)rand_r(&seed) % sizeof(data);
        ssize_t received = recv(flow->host, data, size, 0);

        CHECK(received > 0);
        if (rand_r(&seed) % 64 == 0)
            usleep(300);
        for (ssize_t at = 0; at < received;) {
            ssize_t put = send(flow->host, data + at, (size_t)(received - at), MSG_NOSIGNAL);

            CHECK(put > 0);
            at += put;
        }
        done += (uint64_t)received;
    }
    return NULL;
}

static void test_echo(uint64_t bytes)
{
    struct console_driver driver;
    struct flow flows[PORTS];
    pthread_t drivers[PORTS], hosts[PORTS];
    struct virtio_console_counters counters;

    create(&driver);
    start(&driver);
    for (unsigned port = 0; port < PORTS; port++) {
        int fds[2];

        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
        flows[port] = (struct flow){.driver = &driver, .port = port, .bytes = bytes,
                                    .host = fds[1]};
        virtio_console_set_open(driver.console, port, true);
        CHECK(virtio_console_connect(driver.console, port, fds[0], fds[0]) == 0);
        CHECK(pthread_create(&hosts[port], NULL, echo, &flows[port]) == 0);
        CHECK(pthread_create(&drivers[port], NULL, run_flow, &flows[port]) == 0);
    }
    for (unsigned port = 0; port < PORTS; port++) {
        CHECK(pthread_join(drivers[port], NULL) == 0);
        CHECK(pthread_join(hosts[port], NULL) == 0);
    }
    counters = virtio_console_counters(driver.console);
    CHECK(counters.rx_bytes == PORTS * bytes && counters.tx_bytes == PORTS * bytes);
    CHECK(counters.tx_dropped == 0 && counters.malformed == 0);
    CHECK(virtio_console_take_lost(driver.console) == -1);
    for (unsigned port = 0; port < PORTS; port++)
        close(flows[port].host);
    for (unsigned left = PORTS; left > 0;) {
        struct pollfd polled = {driver.news, POLLIN, 0};
        int port;

        CHECK(poll(&polled, 1, 10000) == 1);
        eventfd_take(driver.news);
        while ((port = virtio_console_take_lost(driver.console)) >= 0) {
            virtio_console_disconnect(driver.console, (uint32_t)port);
            left--;
        }
    }
    stop(&driver);
    printf("%llu bytes on each port: %llu interrupts, %llu stalls of the first driver\n",
           (unsigned long long)bytes, (unsigned long long)counters.interrupts,
           (unsigned long long)flows[0].stalls);
    destroy(&driver);
}

static void collect(struct net_ring *ring, unsigned count)
{
    for (unsigned tries = 0; count > 0; tries++) {
        CHECK(tries < 10000);
        if (net_ring_collect(ring))
            count--;
        else
            usleep(1000);
    }
}

/* A host that leaves in the middle of output, while it is held up. */
static void test_host_leaves(void)
{
    struct console_driver driver;
    struct net_ring *tx = &driver.ring[1];
    int fds[2];

    create(&driver);
    start(&driver);
    for (unsigned round = 0; round < 3; round++) {
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
        CHECK(virtio_console_connect(driver.console, 0, fds[0], fds[0]) == 0);
        for (unsigned i = 0; i < NET_QUEUE_SIZE; i++)
            net_ring_offer(tx, (uint16_t)i);
        net_ring_publish(tx);
        usleep(5000);
        if (round == 2)
            virtio_console_disconnect(driver.console, 0);
        close(fds[1]);
        collect(tx, NET_QUEUE_SIZE);
        if (round < 2) {
            CHECK(virtio_console_take_lost(driver.console) == 0);
            virtio_console_disconnect(driver.console, 0);
        }
        CHECK(virtio_console_take_lost(driver.console) == -1);
        close(fds[0]);
    }
    CHECK(virtio_console_counters(driver.console).tx_dropped > 0);
    stop(&driver);
    destroy(&driver);
}

/* Two descriptors: the end of input is no end of output, and a reader may go. */
static void test_pipes(void)
{
    struct console_driver driver;
    struct net_ring *tx = &driver.ring[1];
    int input[2], output[2];

    create(&driver);
    start(&driver);
    CHECK(pipe2(input, O_NONBLOCK) == 0 && pipe2(output, O_NONBLOCK) == 0);
    virtio_console_set_open(driver.console, 0, true);
    CHECK(virtio_console_connect(driver.console, 0, input[0], output[1]) == 0);
    close(input[1]);
    for (unsigned i = 0; i < NET_QUEUE_SIZE; i++)
        net_ring_offer(tx, (uint16_t)i);
    net_ring_publish(tx);
    usleep(5000);
    close(output[0]);
    collect(tx, NET_QUEUE_SIZE);
    CHECK(virtio_console_take_lost(driver.console) == -1);
    virtio_console_disconnect(driver.console, 0);
    stop(&driver);
    destroy(&driver);
    close(input[0]);
    close(output[1]);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN); /* as Python has it */
    if (argc == 2) {
        test_echo(strtoull(argv[1], NULL, 10));
        return 0;
    }
    test_host_leaves();
    test_pipes();
    test_echo(BYTES);
    return 0;
}
