#include "net_pcap.h"

#include <errno.h>
#include <limits.h>
#include <time.h>

#define ENHANCED_PACKET_BLOCK 6u
#define OPTION_FLAGS 2u
#define FLAG_INBOUND 1u
#define FLAG_OUTBOUND 2u

struct block_head {
    uint32_t type;
    uint32_t length;
    uint32_t interface;
    uint32_t time_high;
    uint32_t time_low;
    uint32_t captured;
    uint32_t original;
};

struct block_tail {
    uint16_t flags_code;
    uint16_t flags_length;
    uint32_t flags;
    uint32_t end_of_options;
    uint32_t length;
};

int net_pcap_write(int fd, bool outbound, const struct iovec *iov, uint32_t count)
{
    static const uint8_t padding[3];
    struct iovec parts[IOV_MAX];
    struct timespec now;
    uint32_t size = 0, kept = 0;

    parts[kept++].iov_len = 0; /* the head, when the size is known */
    for (uint32_t i = 0; i < count && kept < IOV_MAX - 2; i++) {
        parts[kept++] = iov[i];
        size += (uint32_t)iov[i].iov_len;
    }
    clock_gettime(CLOCK_REALTIME, &now);

    uint64_t time = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    uint32_t pad = -size & 3u;
    struct block_tail tail = {
        .flags_code = OPTION_FLAGS,
        .flags_length = sizeof(tail.flags),
        .flags = outbound ? FLAG_OUTBOUND : FLAG_INBOUND,
        .length = (uint32_t)(sizeof(struct block_head) + sizeof(tail)) + size + pad,
    };
    struct block_head head = {
        .type = ENHANCED_PACKET_BLOCK,
        .length = tail.length,
        .time_high = (uint32_t)(time >> 32),
        .time_low = (uint32_t)time,
        .captured = size,
        .original = size,
    };
    parts[0] = (struct iovec){&head, sizeof(head)};
    parts[kept++] = (struct iovec){(void *)padding, pad};
    parts[kept++] = (struct iovec){&tail, sizeof(tail)};
    return writev(fd, parts, (int)kept) < 0 ? -errno : 0;
}
