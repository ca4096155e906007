/* Images behind an NBD server (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md),
 * spoken to by libnbd.
 *
 * Each thread that serves requests has a connection of its own. When one breaks, what is under way
 * on it fails with -EIO or the like. The next request connects anew, and those that come meanwhile
 * wait for the outcome, BLK_NBD_CONNECT_MS at most; after a failure requests fail at once until
 * BLK_NBD_RETRY_MS have passed. A server that leaves requests without any answer for `answer_ms`
 * counts as broken, so that no request waits for good. */
#ifndef PYVMM_BLK_NBD_H
#define PYVMM_BLK_NBD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BLK_NBD_CONNECT_MS 5000
#define BLK_NBD_RETRY_MS 1000

struct blk_remote;
struct blk_nbd;

/* What the server said of the export. Sizes in bytes, 0 for what it did not say. */
struct blk_nbd_info {
    int64_t size;
    int64_t minimum_block;
    int64_t preferred_block;
    bool readonly;
    bool multi_conn; /* a flush on one connection covers the writes on all of them */
    bool fua;
    bool trim;
};

/* Connects to the export that `uri` names. The remote can be used by as many threads as there are
 * connections: one without `multi_conn`. NULL when there is no such server or export; `error` then
 * says why. */
struct blk_nbd *blk_nbd_open(const char *uri, int64_t answer_ms, struct blk_nbd_info *info,
                             char *error, size_t error_size);
/* Disconnects, also the threads that have a connection: these as soon as they look. No request may
 * be under way. */
void blk_nbd_close(struct blk_nbd *nbd);

/* For blk_image.remote. */
struct blk_remote *blk_nbd_remote(struct blk_nbd *nbd);

/* Whether this libnbd can speak TLS (nbds://). */
bool blk_nbd_has_tls(void);

#endif
