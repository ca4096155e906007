/* The network device's pairs of queues with real concurrency: a driver, the device's thread and a
 * peer that sends every frame back. Each arrives once, whole and in order.
 *
 *   test_net          a short run of each size
 *   test_net FRAMES   a soak: so many, of all sizes */
#include <sched.h>
#include <sys/socket.h>

#include "net_driver.h"

#define FRAMES 20000u
#define LARGEST 9014u

static uint64_t step(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

/* The size and contents of frame `number`, for those who send it and those who check it. */
static uint32_t frame_size(uint64_t number, uint32_t largest)
{
    uint64_t state = number;

    step(&state);
    return 14 + (uint32_t)(step(&state) % (largest - 13));
}

static void fill_frame(uint64_t number, uint8_t *data, uint32_t size)
{
    uint64_t state = number ^ 0x1234;

    for (uint32_t i = 0; i + 8 <= size; i += 8) {
        uint64_t word = step(&state);

        memcpy(data + i, &word, 8);
    }
    memset(data + size / 8 * 8, (int)(number & 0xFF), size % 8);
}

struct echo {
    int fd;
    uint64_t frames;
};

static void *echo(void *argument)
{
    struct echo *self = argument;
    static uint8_t data[1 << 16];

    for (uint64_t i = 0; i < self->frames; i++) {
        ssize_t size = recv(self->fd, data, sizeof(data), 0);

        CHECK(size > 0);
        CHECK(send(self->fd, data, (size_t)size, MSG_NOSIGNAL) == size);
    }
    return NULL;
}

/* Takes the frame that begins with `element`, of as many buffers as its header says. */
static void check_frame(struct net_ring *ring, const struct vring_used_elem *element,
                        uint64_t number, uint32_t largest)
{
    static uint8_t expected[LARGEST], got[LARGEST + NET_BUFFER];
    uint32_t size = frame_size(number, largest), have = 0;
    uint16_t buffers;

    memcpy(&buffers, ring->buffers + (size_t)element->id * NET_BUFFER + 10, 2);
    CHECK(buffers == (size + NET_HEADER + NET_BUFFER - 1) / NET_BUFFER);
    for (unsigned i = 0; i < buffers; i++) {
        while (i > 0 && !(element = net_ring_collect(ring)))
            ;
        CHECK(element->len <= NET_BUFFER && have + element->len <= sizeof(got));
        memcpy(got + have, ring->buffers + (size_t)element->id * NET_BUFFER, element->len);
        have += element->len;
        net_ring_offer(ring, (uint16_t)element->id);
    }
    CHECK(have == size + NET_HEADER);
    fill_frame(number, expected, size);
    CHECK(memcmp(got + NET_HEADER, expected, size) == 0);
    net_ring_publish(ring);
}

static void run(uint64_t frames, uint32_t largest)
{
    struct net_driver driver;
    struct net_ring *rx = &driver.ring[0], *tx = &driver.ring[1];
    uint64_t sent = 0, returned = 0, received = 0;
    struct virtio_net_counters counters;
    struct echo peer;
    pthread_t thread;
    int fds[2];

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds) == 0);
    net_driver_create(&driver, fds[0], NET_FRAMING_PACKET, false);
    net_driver_fill(&driver);
    net_driver_start(&driver);
    peer = (struct echo){fds[1], frames};
    CHECK(pthread_create(&thread, NULL, echo, &peer) == 0);

    while (received < frames || returned < frames) {
        const struct vring_used_elem *element;
        bool idle = true;

        while (sent < frames && sent - returned < NET_QUEUE_SIZE / 8 && sent - received < 200) {
            /* Its pieces are as many descriptors, chained. */
            uint32_t size = frame_size(sent, largest), left = size + NET_HEADER;
            uint16_t first = (uint16_t)(sent * 8 % NET_QUEUE_SIZE), id = first;
            uint8_t *data = tx->buffers + (size_t)first * NET_BUFFER;

            memset(data, 0, NET_HEADER);
            fill_frame(sent, data + NET_HEADER, size);
            for (;; id++) {
                uint32_t part = left < NET_BUFFER ? left : NET_BUFFER;

                left -= part;
                tx->desc[id].len = part;
                tx->desc[id].flags = left > 0 ? VRING_DESC_F_NEXT : 0;
                tx->desc[id].next = (uint16_t)(id + 1);
                if (left == 0)
                    break;
            }
            net_ring_offer(tx, first);
            net_ring_publish(tx);
            sent++;
            idle = false;
        }
        while ((element = net_ring_collect(tx))) {
            CHECK(element->id == returned * 8 % NET_QUEUE_SIZE && element->len == 0);
            returned++;
            idle = false;
        }
        while (received < frames && (element = net_ring_collect(rx))) {
            check_frame(rx, element, received, largest);
            received++;
            idle = false;
        }
        if (idle)
            sched_yield();
    }
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(net_driver_stop(&driver) == VIRTIO_NET_STOPPED);
    counters = virtio_net_pair_counters(driver.pair);
    CHECK(counters.rx_frames == frames && counters.tx_frames == frames);
    CHECK(counters.rx_bytes == counters.tx_bytes);
    CHECK(counters.rx_dropped + counters.tx_dropped + counters.malformed == 0);
    printf("%llu frames up to %u bytes: %llu spilled, %llu interrupts, %llu waits\n",
           (unsigned long long)frames, largest, (unsigned long long)counters.rx_spilled,
           (unsigned long long)counters.interrupts, (unsigned long long)counters.tx_waits);
    net_driver_destroy(&driver);
    close(fds[0]);
    close(fds[1]);
}

/* A peer that closes ends the run once; the next drops what the driver sends. */
static void test_peer_gone(void)
{
    struct net_driver driver;
    int fds[2];

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds) == 0);
    net_driver_create(&driver, fds[0], NET_FRAMING_PACKET, false);
    net_driver_fill(&driver);
    close(fds[1]);
    CHECK(virtio_net_pair_run(driver.pair) == VIRTIO_NET_GONE);
    driver.ring[1].desc[0].len = NET_HEADER + 60;
    net_ring_offer(&driver.ring[1], 0);
    net_ring_publish(&driver.ring[1]);
    virtio_net_pair_stop(driver.pair);
    CHECK(virtio_net_pair_run(driver.pair) == VIRTIO_NET_STOPPED);
    CHECK(net_ring_collect(&driver.ring[1]));
    CHECK(virtio_net_pair_counters(driver.pair).tx_dropped == 1);
    net_driver_destroy(&driver);
    close(fds[0]);
}

int main(int argc, char **argv)
{
    if (argc == 2) {
        run(strtoull(argv[1], NULL, 10), LARGEST);
        return 0;
    }
    test_peer_gone();
    run(FRAMES, 60);
    run(FRAMES, 1514);
    run(FRAMES, LARGEST);
    return 0;
}
