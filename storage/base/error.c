/* Errors are built in place: the struct is the caller's, the message is cut at its end rather than
 * allocated, so that reporting "out of memory" needs none. A cut never splits a UTF-8 sequence:
 * messages end up in JSON answers. */
#include "storage/base/error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Drops a UTF-8 sequence that the end of the buffer cut in two. Only called when text was cut. */
static void trim_cut_sequence(char *text)
{
    size_t length = strlen(text);
    size_t start = length;
    unsigned char lead;
    size_t wanted;

    while (start > 0 && length - start < 4) {
        start--;
        if (((unsigned char)text[start] & 0xC0u) != 0x80u)
            break;
    }
    if (start == length)
        return;
    lead = (unsigned char)text[start];
    wanted = lead < 0x80u ? 1 : lead < 0xE0u ? 2 : lead < 0xF0u ? 3 : 4;
    if (lead >= 0xC0u && length - start < wanted)
        text[start] = '\0';
}

/* Appends at `at`; what does not fit is cut. */
static void append_v(struct error *err, size_t at, const char *format, va_list args)
{
    size_t room = sizeof err->message - at;
    int wanted = vsnprintf(err->message + at, room, format, args);

    if (wanted < 0)
        err->message[at] = '\0';
    else if ((size_t)wanted >= room)
        trim_cut_sequence(err->message);
}

static void append(struct error *err, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static void append(struct error *err, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    append_v(err, strlen(err->message), format, args);
    va_end(args);
}

int error_set(struct error *err, enum error_code code, const char *format, ...)
{
    va_list args;

    if (!err || err->code != ERR_NONE)
        return -1;
    /* "No error" cannot be set: whoever tries has lost the real code. */
    err->code = code == ERR_NONE ? ERR_INTERNAL : code;
    va_start(args, format);
    append_v(err, 0, format, args);
    va_end(args);
    return -1;
}

static enum error_code code_of_errno(int errno_value)
{
    switch (errno_value) {
    case ENOSPC:
    case EDQUOT:
        return ERR_NO_SPACE;
    case EACCES:
    case EPERM:
    case EROFS:
        return ERR_PERMISSION;
    case ENOENT:
        return ERR_NOT_FOUND;
    case EEXIST:
        return ERR_EXISTS;
    case ENOMEM:
        return ERR_NOMEM;
    case EWOULDBLOCK:
        return ERR_BUSY;
    default:
        return ERR_IO;
    }
}

int error_set_errno(struct error *err, int errno_value, const char *format, ...)
{
    va_list args;
    char buffer[128];

    if (!err || err->code != ERR_NONE)
        return -1;
    /* vfs calls return negative errno values; taking both spares every caller a sign. */
    if (errno_value < 0)
        errno_value = -errno_value;
    err->code = code_of_errno(errno_value);
    va_start(args, format);
    append_v(err, 0, format, args);
    va_end(args);
    append(err, ": %s", strerror_r(errno_value, buffer, sizeof buffer));
    return -1;
}

void error_remedy(struct error *err, const char *format, ...)
{
    va_list args;

    if (!err || err->code == ERR_NONE)
        return;
    append(err, "\n  to mend: ");
    va_start(args, format);
    append_v(err, strlen(err->message), format, args);
    va_end(args);
}

int error_prefix(struct error *err, const char *format, ...)
{
    char old[sizeof err->message];
    va_list args;

    if (!err || err->code == ERR_NONE)
        return -1;
    memcpy(old, err->message, sizeof old);
    va_start(args, format);
    append_v(err, 0, format, args);
    va_end(args);
    append(err, ": %s", old);
    return -1;
}

void error_clear(struct error *err)
{
    if (!err)
        return;
    err->code = ERR_NONE;
    err->message[0] = '\0';
}

const char *error_code_name(enum error_code code)
{
    static const char *const names[ERR_COUNT] = {
        [ERR_NONE] = "ERR_NONE",
        [ERR_INVALID] = "ERR_INVALID",
        [ERR_NOT_FOUND] = "ERR_NOT_FOUND",
        [ERR_EXISTS] = "ERR_EXISTS",
        [ERR_CORRUPT] = "ERR_CORRUPT",
        [ERR_UNSUPPORTED] = "ERR_UNSUPPORTED",
        [ERR_IO] = "ERR_IO",
        [ERR_NO_SPACE] = "ERR_NO_SPACE",
        [ERR_PERMISSION] = "ERR_PERMISSION",
        [ERR_BUSY] = "ERR_BUSY",
        [ERR_NOMEM] = "ERR_NOMEM",
        [ERR_BUDGET] = "ERR_BUDGET",
        [ERR_CANCELLED] = "ERR_CANCELLED",
        [ERR_TIMEOUT] = "ERR_TIMEOUT",
        [ERR_CONFLICT] = "ERR_CONFLICT",
        [ERR_INTERNAL] = "ERR_INTERNAL",
    };

    return (unsigned)code < ERR_COUNT ? names[code] : "ERR_?";
}
