/* reader: batched asynchronous reads, one contract over two backends.
 *
 * A reader belongs to the thread that opened it; nobody else may touch it. Reads are submitted in
 * batches and come back in any order; a read is done only when all its bytes are there: short reads
 * are resumed, interrupted ones tried again, a read past the end of the file fails. Buffers and
 * requests belong to the reader from submit until wait returns them, also after an error.
 *
 * io_uring: Axboe, "Efficient IO with io_uring", 2019. The pread backend is a pool of threads with
 * the same contract: for kernels and containers without io_uring, and as the reference. */
#ifndef ANND_STORAGE_READER_H
#define ANND_STORAGE_READER_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/base/error.h"
#include "storage/vfs.h"

enum reader_backend { READER_AUTO, READER_URING, READER_PREAD };

#define READER_DEPTH_MAX 1024u

/* One read. Offset, bytes and buffer are multiples of FILE_BLOCK_BYTES. */
struct reader_read {
    struct vfs_file *file;
    uint64_t offset;
    uint32_t bytes;
    int error; /* after completion: 0, or a positive errno (EIO also for "file ends before") */
    uint8_t *buffer;
    void *owner; /* the caller's, untouched */
    /* The reader's, until completion: */
    uint32_t done_bytes;
    uint32_t retries;
    struct reader_read *next;
};

struct reader;

/* depth: reads in flight at most, 1..READER_DEPTH_MAX. READER_AUTO takes io_uring if
 * reader_probe() allowed it. ERR_UNSUPPORTED when READER_URING was asked for and the kernel says
 * no; ERR_NOMEM; ERR_INVALID. */
int reader_open(enum reader_backend backend, uint32_t depth, struct reader **out,
                struct error *err);
/* Waits for everything in flight, then frees. NULL is accepted. */
void reader_close(struct reader *reader);

/* Hands over `count` reads; in flight plus count must not exceed depth (ERR_INVALID). On ERR_IO
 * none, some or all were taken: the untaken ones come back from reader_wait with an error set. */
int reader_submit(struct reader *reader, struct reader_read **reads, uint32_t count,
                  struct error *err);
/* Returns up to done_max completed reads, after waiting until at least one is there if anything is
 * in flight and `block` is set. 0 when nothing is in flight. Never fails: what goes wrong is in
 * each read's `error`. */
uint32_t reader_wait(struct reader *reader, struct reader_read **done, uint32_t done_max,
                     bool block);
uint32_t reader_in_flight(const struct reader *reader);
uint32_t reader_depth(const struct reader *reader);
/* What READER_AUTO became. */
enum reader_backend reader_backend_of(const struct reader *reader);
const char *reader_backend_name(enum reader_backend backend);

/* Tries io_uring in a child process (a seccomp filter may kill it): ring, NOP and one real read of
 * this program's own file. Returns READER_URING, or READER_PREAD with the cause in `reason`
 * (256 bytes). ANND_IO=pread in the environment gives READER_PREAD untried: for tests. Call once,
 * before any thread or ring exists; later calls return the first answer. */
enum reader_backend reader_probe(char reason[256]);

/* "auto", "uring" or "pread"; ERR_INVALID names the choices. */
int reader_backend_parse(const char *text, enum reader_backend *out, struct error *err);

#endif
