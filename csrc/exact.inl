// The definition corner by corner, for the rare chunk whose numbers are not all finite. There the
// fast path, which gives a weight of 0 to cells that the definition does not read, would turn an
// infinity in such a cell into NaN.

template <class T>
struct Corner {
  int64_t row;
  T weight;
  T slopes[3];  // by x, y, z
};

// The corners that the definition reads for one point.
template <class T>
struct Corners {
  Corner<T> list[8];
  int count = 0;
};

template <class T, int N>
void corners_of(const Problem& problem, const Level& level, const T* location, int64_t point,
                Corners<T>& corners) {
  // Locates a whole vector for one point: this path is rare and its numbers must be the same.
  T padded[N * kWidth<T>] = {};
  std::copy_n(location, N, padded);
  const Located<T, N> points(problem, point_table<T>(problem), padded, point);
  const int64_t sizes[] = {level.width, level.height, level.depth};
  corners.count = 0;
  for (int combination = 0; combination < 1 << N; ++combination) {
    Corner<T> corner = {0, T(1), {}};
    std::fill_n(corner.slopes, N, T(1));
    bool read = true;
    for (int n = N; n-- > 0;) {
      const Axis<T>& axis = points.axes[n];
      const int i = combination >> n & 1;
      read = read && axis.is_corner[i][0] != 0;
      corner.row = corner.row * sizes[n] + static_cast<int64_t>(axis.base[0]) + i;
      corner.weight *= axis.weights[i][0];
      for (int by = 0; by < N; ++by) {
        corner.slopes[by] *= by == n ? axis.slopes[i][0] : axis.weights[i][0];
      }
    }
    if (read) {
      corner.row += level.first_row;
      corners.list[corners.count++] = corner;
    }
  }
}

// Calls visit(point, attention weight, corners) for each point of a look.
template <class T, class Visit>
void for_each_point(const Problem& problem, const LookPoints<T>& look, Visit visit) {
  with_axes(problem, [&](auto axes) {
    constexpr int N = decltype(axes)::value;
    Corners<T> corners;
    for (const Level& level : problem.levels) {
      for (int64_t k = 0; k < level.num_points; ++k) {
        const int64_t point = level.first_point + k;
        corners_of<T, N>(problem, level, look.locations + N * point, point, corners);
        visit(point, look.attention_weights[point], corners);
      }
    }
  });
}

template <class S>
Compute<S> number(const S* from) {
  return load_partial<S, Compute<S>>(from, 1)[0];
}

template <class S, class T>
void exact_forward(const Problem& problem, const LookPoints<T>& look, const S* rows,
                   int64_t row_stride, S* output) {
  for (int64_t channel = 0; channel < problem.head_dim; ++channel) {
    T sum = 0;
    for_each_point(problem, look, [&](int64_t, T attention, const Corners<T>& corners) {
      T sampled = 0;
      for (int i = 0; i < corners.count; ++i) {
        const Corner<T>& corner = corners.list[i];
        sampled += corner.weight * number(rows + corner.row * row_stride + channel);
      }
      sum += attention * sampled;
    });
    store_partial<S, T>(output + channel, splat<T>(sum), 1);
  }
}

// grad_output, grad_locations and grad_weights are those of the look.
template <class S, class T>
void exact_backward_points(const Problem& problem, const LookPoints<T>& look, const S* rows,
                           int64_t row_stride, const S* grad_output, T* grad_locations,
                           T* grad_weights) {
  const int64_t spatial_dims = problem.spatial_dims;
  for_each_point(problem, look, [&](int64_t at, T attention, const Corners<T>& corners) {
    T grad_location[3] = {}, grad_weight = 0;
    for (int i = 0; i < corners.count; ++i) {
      const Corner<T>& corner = corners.list[i];
      T dot = 0;
      for (int64_t channel = 0; channel < problem.head_dim; ++channel) {
        dot += number(grad_output + channel) * number(rows + corner.row * row_stride + channel);
      }
      grad_weight += corner.weight * dot;
      for (int64_t n = 0; n < spatial_dims; ++n) {
        grad_location[n] += corner.slopes[n] * (attention * dot);
      }
    }
    std::copy_n(grad_location, spatial_dims, grad_locations + spatial_dims * at);
    grad_weights[at] = grad_weight;
  });
}

// Adds to the rows of the band only (see band.inl).
template <class S, class T>
void exact_backward_value(const Problem& problem, const LookPoints<T>& look, const S* grad_output,
                          const Band& band, T* grad_rows, int64_t row_stride) {
  for_each_point(problem, look, [&](int64_t, T attention, const Corners<T>& corners) {
    for (int i = 0; i < corners.count; ++i) {
      const Corner<T>& corner = corners.list[i];
      if (!band.owns(corner.row)) {
        continue;
      }
      T* grad_row = grad_rows + corner.row * row_stride;
      for (int64_t channel = 0; channel < problem.head_dim; ++channel) {
        grad_row[channel] += corner.weight * attention * number(grad_output + channel);
      }
    }
  });
}
