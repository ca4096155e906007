/* A disk as a SCSI logical unit (SPC-4, SBC-3) on an image: the one table of what it can do, and
 * the commands that are frequent or simple. The others are Python's (pyvmm/backends/scsi). */
#ifndef PYVMM_SCSI_DISK_H
#define PYVMM_SCSI_DISK_H

#include "scsi.h"

/* Limits of one command in bytes, as VPD page B0h tells them in blocks. */
#define SCSI_DISK_MAX_TRANSFER (32u << 20)
#define SCSI_DISK_MAX_RANGE (2u << 30) /* UNMAP, WRITE SAME */
#define SCSI_DISK_MAX_UNMAP_DESCRIPTORS 256u

/* An ability of a scsi_lun: space can be given back. */
#define SCSI_DISK_UNMAP 1u

struct scsi_disk {
    struct scsi_lun lun;
    struct blk_image *image;      /* its `size` may grow at any time */
    struct scsi_handoff *handoff; /* to whom commands go that only Python can execute */
    uint32_t block_size;
    uint8_t physical_exponent;    /* 2 to the power of it blocks are a physical one */
    bool readonly;
    bool zeroed;                  /* what was unmapped reads as zeroes (LBPRZ) */
    bool default_write_cache;
    bool write_cache; /* atomic: WCE; if not set, a write is stable when it is done */
    bool stopped;     /* atomic: by START STOP UNIT */
    bool reserved;    /* atomic: by RESERVE (SPC-2) */
    bool registered;  /* atomic, Python's: a persistent reservation key is registered */
};

/* The caller has set the members between `image` and `default_write_cache`. 0 or -errno. */
int scsi_disk_init(struct scsi_disk *disk, const struct scsi_page *pages, uint32_t page_count);
void scsi_disk_destroy(struct scsi_disk *disk);

/* Its commands, also those of the front end and of Python. */
const struct scsi_opcodes *scsi_disk_opcodes(void);

#endif
