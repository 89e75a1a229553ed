/* vfs_fault: a vfs that passes every call to another and lets one of them go wrong.
 *
 * A plan names a kind of call, which one of them (the nth), and what happens to it: an errno, a
 * short transfer, a torn or forgotten write, a flipped bit. A sweep runs the code once with no
 * plan, asks how many calls there were, and then fails each in turn:
 *
 *     vfs_fault_init(&fault, vfs_posix());
 *     run(&fault.vfs);
 *     calls = vfs_fault_calls(&fault, VFS_CALL_ANY);
 *     for (nth = 1; nth <= calls; nth++) {
 *         vfs_fault_plan(&fault, &(struct vfs_fault_plan){.nth = nth, .errno_value = EIO});
 *         run(&fault.vfs);   must fail or succeed cleanly
 *     }
 *
 * Any thread may use the vfs; the plan is set while nobody does. */
#ifndef ANND_TESTS_SUPPORT_VFS_FAULT_H
#define ANND_TESTS_SUPPORT_VFS_FAULT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "storage/vfs.h"

enum vfs_call {
    VFS_CALL_ANY, /* matches all that follow */
    VFS_CALL_OPEN,
    VFS_CALL_CLOSE, /* the file is closed all the same */
    VFS_CALL_READ,  /* pread, and read_result of an asynchronous read */
    VFS_CALL_WRITE,
    VFS_CALL_SYNC,
    VFS_CALL_ALLOCATE,
    VFS_CALL_TRUNCATE,
    VFS_CALL_SIZE,
    VFS_CALL_LOCK,
    VFS_CALL_STAT,
    VFS_CALL_RENAME,
    VFS_CALL_LINK,
    VFS_CALL_UNLINK,
    VFS_CALL_MKDIR,
    VFS_CALL_RMDIR,
    VFS_CALL_LIST,
    VFS_CALL_DIRSYNC,
    VFS_CALL_SPACE,
    VFS_CALL_COUNT
};

/* An effect that means nothing to the call it meets (a flipped bit in a rename) leaves that call
 * alone, but counts as fired. */
enum vfs_effect {
    VFS_EFFECT_ERRNO, /* nothing is done, -errno_value is returned */
    VFS_EFFECT_SHORT, /* reads, writes: only the first `bytes` are moved, and that is said */
    VFS_EFFECT_TEAR,  /* writes: only the first `bytes` are moved, success is claimed; reads: the
                       * rest of the buffer is garbage */
    VFS_EFFECT_TEAR_ERRNO, /* writes: only the first `bytes` are moved, then -errno_value */
    VFS_EFFECT_FLIP,  /* reads, writes: bit number `bit` (modulo the length) is the other way */
    VFS_EFFECT_FORGET /* write, sync, allocate, truncate, rename, link, unlink, mkdir, rmdir,
                       * dirsync: nothing is done, success is claimed */
};

struct vfs_fault_plan {
    enum vfs_call call;
    uint64_t nth;  /* from 1; 0: never */
    bool for_ever; /* that call and every matching one after it; else once */
    enum vfs_effect effect;
    int errno_value; /* positive */
    uint64_t bytes;  /* 0: half of what was asked, rounded down */
    uint64_t bit;
    const char *path; /* only calls whose path (or either path) contains this; NULL: all */
};

struct vfs_fault {
    struct vfs vfs; /* give this to the code under test */
    struct vfs *inner;
    pthread_mutex_t mutex;
    /* Under the mutex: */
    struct vfs_fault_plan plan;
    uint64_t matched; /* calls the plan's kind and path matched */
    uint64_t fired;
    uint64_t calls[VFS_CALL_COUNT]; /* [VFS_CALL_ANY]: all of them */
    int64_t files_open;
};

/* inner is borrowed and must outlive the fault. No plan is set. */
void vfs_fault_init(struct vfs_fault *fault, struct vfs *inner);
/* Files must be closed. */
void vfs_fault_release(struct vfs_fault *fault);

/* Copies the plan (its path is borrowed) and starts counting afresh; NULL: nothing goes wrong. */
void vfs_fault_plan(struct vfs_fault *fault, const struct vfs_fault_plan *plan);

/* Since the last vfs_fault_plan: calls of a kind, and how many of them went wrong. */
uint64_t vfs_fault_calls(struct vfs_fault *fault, enum vfs_call call);
uint64_t vfs_fault_fired(struct vfs_fault *fault);
/* Opened and not closed, over the fault's whole life: a leak when it is not 0 at the end. */
int64_t vfs_fault_files_open(struct vfs_fault *fault);

#endif
