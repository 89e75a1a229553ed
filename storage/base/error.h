/* Errors: a code for programs, a sentence for people.
 *
 * What can fail returns 0 or -1 (or NULL) and fills the caller's struct error. The first error
 * wins: a later error_set() on the same struct changes nothing, so cleanup code may fail freely.
 * The message's first line is the whole sentence (what, where, wanted, found); further lines, if
 * any, say what to do. Any thread may use its own struct; none is shared. */
#ifndef ANND_STORAGE_BASE_ERROR_H
#define ANND_STORAGE_BASE_ERROR_H

enum error_code {
    ERR_NONE = 0,
    ERR_INVALID,     /* the caller's input or parameters are wrong */
    ERR_NOT_FOUND,   /* a file, collection, field or key that is not there */
    ERR_EXISTS,      /* something of that name is there already */
    ERR_CORRUPT,     /* stored bytes fail a check */
    ERR_UNSUPPORTED, /* a format or feature newer than this program, or one the machine lacks */
    ERR_IO,          /* the operating system failed a call */
    ERR_NO_SPACE,    /* disk full or quota reached */
    ERR_PERMISSION,  /* not allowed to touch the file or port */
    ERR_BUSY,        /* locked by another process; queue full */
    ERR_NOMEM,       /* malloc said no */
    ERR_BUDGET,      /* would exceed the memory, disk or time that was granted */
    ERR_CANCELLED,   /* the job's owner asked it to stop */
    ERR_TIMEOUT,     /* the deadline passed */
    ERR_CONFLICT,    /* somebody else published first */
    ERR_INTERNAL,    /* a bug of ours, reported instead of crashing */
    ERR_COUNT
};

struct error {
    enum error_code code;
    char message[1024];
};

/* A zeroed struct error is a good one; this spells it. */
#define ERROR_INIT                                                                                 \
    {                                                                                              \
        ERR_NONE, ""                                                                               \
    }

/* Sets code and message unless an error is set already. err may be NULL. Always returns -1. */
int error_set(struct error *err, enum error_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The same from an errno value: the code is derived from it (ENOSPC: ERR_NO_SPACE, EACCES:
 * ERR_PERMISSION, ENOENT: ERR_NOT_FOUND, ...) and ": <strerror>" is appended. Returns -1. */
int error_set_errno(struct error *err, int errno_value, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Appends a remedy line ("\n  to mend: ...") to a set error. */
void error_remedy(struct error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Puts "context: " before the message of a set error. Returns -1. */
int error_prefix(struct error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Makes err usable again. */
void error_clear(struct error *err);

/* "ERR_CORRUPT" and so on, for logs and tests. */
const char *error_code_name(enum error_code code);

#endif
