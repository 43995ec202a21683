// The lists of a compact layer, from tensors to pointers, for the rims of linear layers and of
// convolutions.
#pragma once

#include "linear/sparse_linear.h"
#include "rim/rim.h"

namespace lottery_sparse {

// Networks, rows, and lists by row; the tensors stay alive in the caller.
struct CheckedLists {
    int64_t replicates, rows;
    CompactLists lists;
};

// values [C] or [E, C]; starts [N + 1] or [E, N + 1]. Makes them contiguous.
inline CheckedLists checked_lists(Tensor& values, ScalarType dtype, Tensor& starts,
                                  Tensor& columns) {
    values = checked("values", values, dtype);
    check_rank("values", values, 1, 2);
    starts = checked("starts", starts, ScalarType::Long);
    const bool wide = columns.scalar_type() == ScalarType::Int;
    columns = checked("columns", columns, wide ? ScalarType::Int : ScalarType::Short);
    const int64_t d = values.dim();
    STD_TORCH_CHECK(same_shape(values, columns) && starts.dim() == d &&
                        (d == 1 || starts.size(0) == values.size(0)) && starts.size(d - 1) > 0,
                    "values ", shape_text(values), ", columns ", shape_text(columns),
                    " and starts ", shape_text(starts), " do not fit each other.");
    check_ends("starts", starts, values.size(d - 1));
    return {d == 2 ? values.size(0) : 1,
            starts.size(d - 1) - 1,
            {static_cast<const int64_t*>(starts.const_data_ptr()), columns.const_data_ptr(),
             nullptr, nullptr, nullptr, values.size(d - 1), wide}};
}

// Adds the lists by column to those of `values`; there are `columns` of them in a network.
inline void add_lists_by_column(CompactLists& lists, const Tensor& values, int64_t replicates,
                                int64_t columns, Tensor& column_starts, Tensor& rows,
                                Tensor& positions) {
    column_starts = checked("column_starts", column_starts, ScalarType::Long);
    rows = checked("rows", rows, lists.wide ? ScalarType::Int : ScalarType::Short);
    positions = checked("positions", positions, ScalarType::Int);
    STD_TORCH_CHECK(same_shape(rows, values) && same_shape(positions, values) &&
                        column_starts.numel() == replicates * (columns + 1),
                    "rows ", shape_text(rows), ", positions ", shape_text(positions),
                    " and column_starts ", shape_text(column_starts), " do not fit values ",
                    shape_text(values), ".");
    check_ends("column_starts", column_starts, lists.capacity);
    lists.column_starts = static_cast<const int64_t*>(column_starts.const_data_ptr());
    lists.rows = rows.const_data_ptr();
    lists.positions = static_cast<const int32_t*>(positions.const_data_ptr());
}

}  // namespace lottery_sparse
