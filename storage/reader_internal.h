/* What the two backends of reader share: the reader itself and the rule for when a read is done.
 *
 * Private to storage/reader*.c and their test. Everything here belongs to the reader's thread
 * except struct reader_pread, whose fields below `lock` are guarded by it. */
#ifndef ANND_STORAGE_READER_INTERNAL_H
#define ANND_STORAGE_READER_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "storage/base/error.h"
#include "storage/reader.h"

/* Times a read may come back without progress (interrupted, told to try again, or cut short inside
 * its first block) before that becomes its error. */
#define READER_RETRIES_MAX 16u

#define READER_THREADS_MAX 32u

/* A queue of reads, linked through reader_read.next. All zero is an empty one. */
struct reader_list {
    struct reader_read *first;
    struct reader_read *last;
    uint32_t count;
};

void reader_list_push(struct reader_list *list, struct reader_read *read);
/* NULL when empty. */
struct reader_read *reader_list_pop(struct reader_list *list);

/* A backend. Neither call can fail: what goes wrong ends in the reads' `error`. */
struct reader_ops {
    /* Takes `count` reads that fit the depth and are set up; may put some straight on `ready`. */
    void (*submit)(struct reader *reader, struct reader_read **reads, uint32_t count);
    /* Moves what is complete to `ready`. With `block`: only when ready is empty and something is
     * in flight, and returns with ready not empty. */
    void (*reap)(struct reader *reader, bool block);
    /* Nothing is in flight any more. */
    void (*close)(struct reader *reader);
};

struct reader_pread {
    uint32_t thread_count; /* started so far; the reader's thread only */
    pthread_t threads[READER_THREADS_MAX];
    pthread_mutex_t lock;
    pthread_cond_t work_there;
    pthread_cond_t done_there;
    struct reader_list queue; /* not begun */
    struct reader_list done;  /* complete, not yet moved to reader.ready */
    uint32_t running;         /* taken from the queue, not yet in done */
    bool owner_waits;
    bool stop;
};

struct reader_uring;

struct reader {
    const struct reader_ops *ops;
    enum reader_backend backend;
    uint32_t depth;
    uint32_t in_flight;       /* submitted and not yet returned: `ready` is part of it */
    struct reader_list ready; /* complete, for the next reader_wait */
    struct reader_uring *uring;
    struct reader_pread pread; /* embedded, so that changing over to it needs no memory */
};

/* Books one result (bytes read or negative errno) of the part of `read` that was still missing.
 * True: complete, `error` says how. False: the rest, from done_bytes on, is to be read again. */
bool reader_settle(struct reader_read *read, int64_t result);
/* Does the rest of one read through vfs->pread, to the end. Any thread. */
void reader_read_now(struct reader_read *read);

/* Makes `reader` a pread one; what is in flight must be submitted to it again. Cannot fail. */
void reader_pread_attach(struct reader *reader);
/* Makes `reader` an io_uring one, or returns a negative errno and leaves it alone. */
int reader_uring_attach(struct reader *reader);
/* Completions that answered no known read, since the reader was opened. 0 for pread. */
uint64_t reader_uring_strays(const struct reader *reader);

/* How far a trial of io_uring came. */
enum reader_trial {
    READER_TRIAL_OPEN, /* this program's own file */
    READER_TRIAL_SETUP,
    READER_TRIAL_NOP,
    READER_TRIAL_READ,
    READER_TRIAL_VERIFY,
    READER_TRIAL_PASSED
};

/* Ring, NOP, one read of `bytes` at offset 0 of fd into `block`. Sets *trial to the step it ended
 * in; READER_TRIAL_VERIFY and the number of bytes read when all went well, else a negative errno.
 * Calls nothing that is unsafe between fork and exec. */
int reader_uring_try(int fd, void *block, uint32_t bytes, enum reader_trial *trial);

/* reader_probe without the memory of earlier answers. */
enum reader_backend reader_probe_now(char reason[256]);

#endif
