// The definition corner by corner, for the rare chunk whose results are not all finite. There the
// fast path, which gives a weight of 0 to cells that the definition does not read, would turn an
// infinity in such a cell into NaN.

template <class T>
struct ExactCorner {
  int64_t row;
  T weight;
  T slopes[3];  // by x, y, z
};

// The corners that the definition reads for one point.
template <class T>
struct ExactCorners {
  ExactCorner<T> list[8];
  int count = 0;
};

template <class T, int N>
void find_exact_corners(const Plan& plan, const Level& level, const T* location, int64_t point,
                        ExactCorners<T>& corners) {
  // Computes a whole vector for one point: this path is rare and its results must be the same.
  T padded[N * kWidth<T>] = {};
  std::copy_n(location, N, padded);
  const PointCells<T, N> cells(plan, point_table<T>(plan), padded, point);
  const int64_t sizes[] = {level.width, level.height, level.depth};
  corners.count = 0;
  for (int combination = 0; combination < 1 << N; ++combination) {
    ExactCorner<T> corner = {0, T(1), {}};
    std::fill_n(corner.slopes, N, T(1));
    bool is_read = true;
    for (int n = N; n-- > 0;) {
      const AxisCells<T>& axis = cells.axes[n];
      const int i = combination >> n & 1;
      is_read = is_read && axis.is_corner[i][0] != 0;
      corner.row = corner.row * sizes[n] + static_cast<int64_t>(axis.base[0]) + i;
      corner.weight *= axis.weights[i][0];
      for (int by = 0; by < N; ++by) {
        corner.slopes[by] *= by == n ? axis.slopes[i][0] : axis.weights[i][0];
      }
    }
    if (is_read) {
      corner.row += level.first_row;
      corners.list[corners.count++] = corner;
    }
  }
}

// Calls visit(point, attention weight, corners) for each point of a (query, head) pair.
template <class T, class Visit>
void for_each_point(const Plan& plan, const PairPoints<T>& pair, Visit visit) {
  with_axes(plan, [&](auto axes) {
    constexpr int N = decltype(axes)::value;
    ExactCorners<T> corners;
    for (const Level& level : plan.levels) {
      for (int64_t k = 0; k < level.num_points; ++k) {
        const int64_t point = level.first_point + k;
        find_exact_corners<T, N>(plan, level, pair.locations + N * point, point, corners);
        visit(point, pair.attention_weights[point], corners);
      }
    }
  });
}

template <class S>
Compute<S> to_compute(const S* element) {
  return load_partial<S, Compute<S>>(element, 1)[0];
}

template <class S, class T>
void exact_forward(const Plan& plan, const PairPoints<T>& pair, const S* rows, int64_t row_stride,
                   S* output) {
  for (int64_t channel = 0; channel < plan.call.head_dim; ++channel) {
    T sum = 0;
    for_each_point(plan, pair, [&](int64_t, T attention, const ExactCorners<T>& corners) {
      T sampled = 0;
      for (int i = 0; i < corners.count; ++i) {
        const ExactCorner<T>& corner = corners.list[i];
        sampled += corner.weight * to_compute(rows + corner.row * row_stride + channel);
      }
      sum += attention * sampled;
    });
    store_partial<S, T>(output + channel, splat<T>(sum), 1);
  }
}

// grad_output, grad_locations and grad_weights are those of the (query, head) pair.
template <class S, class T>
void exact_backward_points(const Plan& plan, const PairPoints<T>& pair, const S* rows,
                           int64_t row_stride, const S* grad_output, T* grad_locations,
                           T* grad_weights) {
  const int64_t spatial_dims = plan.call.spatial_dims;
  for_each_point(plan, pair, [&](int64_t point, T attention, const ExactCorners<T>& corners) {
    T grad_location[3] = {}, grad_weight = 0;
    for (int i = 0; i < corners.count; ++i) {
      const ExactCorner<T>& corner = corners.list[i];
      const S* row = rows + corner.row * row_stride;
      T dot = 0;
      for (int64_t channel = 0; channel < plan.call.head_dim; ++channel) {
        dot += to_compute(grad_output + channel) * to_compute(row + channel);
      }
      grad_weight += corner.weight * dot;
      for (int64_t n = 0; n < spatial_dims; ++n) {
        grad_location[n] += corner.slopes[n] * (attention * dot);
      }
    }
    std::copy_n(grad_location, spatial_dims, grad_locations + spatial_dims * point);
    grad_weights[point] = grad_weight;
  });
}

// Adds to the rows of the band only (see band.inl).
template <class S, class T>
void exact_backward_value(const Plan& plan, const PairPoints<T>& pair, const S* grad_output,
                          const Band& band, T* grad_rows, int64_t row_stride) {
  for_each_point(plan, pair, [&](int64_t, T attention, const ExactCorners<T>& corners) {
    for (int i = 0; i < corners.count; ++i) {
      const ExactCorner<T>& corner = corners.list[i];
      if (!band.owns(corner.row)) {
        continue;
      }
      T* grad_row = grad_rows + corner.row * row_stride;
      for (int64_t channel = 0; channel < plan.call.head_dim; ++channel) {
        grad_row[channel] += corner.weight * attention * to_compute(grad_output + channel);
      }
    }
  });
}
